"""The pocket world: one coloured shape on a patterned ground, 64x64, drawn by formula.

A scene is five integers and its caption one sentence, "a big red star on dots at left": 8 shapes x
8 colours x 5 grounds x 2 sizes x 5 places = 3,200 captions.  Shapes are signed distances d (pixels,
negative inside) and coverage = clamp(1/2 - d, 0, 1), which antialiases an edge over one pixel.
Grounds have two tones of one muted tint and a period of at least 15 pixels, so that latents of 8x8
can hold them.

Held out of the teachers' training: colour == (3 shape + 5) % 8 or ground == (2 shape + 1) % 5, that
is 30 % of the captions.  Each shape misses one colour and one ground; shares are equal for all
shapes, sizes and places.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "moon")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
GROUNDS = ("plain", "stripes", "dots", "checker", "gradient")
SIZES = ("small", "big")
PLACES = ("center", "left", "right", "top", "bottom")
ATTRIBUTES = {"shape": SHAPES, "colour": COLOURS, "ground": GROUNDS, "size": SIZES, "place": PLACES}

SIDE = 64
RADII = (12.0, 18.0)
OFFSETS = ((0.0, 0.0), (-12.0, 0.0), (12.0, 0.0), (0.0, -12.0), (0.0, 12.0))
RGB = (
    (0.86, 0.10, 0.12),
    (0.98, 0.52, 0.05),
    (0.98, 0.90, 0.12),
    (0.10, 0.62, 0.18),
    (0.10, 0.85, 0.90),
    (0.10, 0.22, 0.86),
    (0.48, 0.10, 0.66),
    (0.98, 0.50, 0.76),
)
CREAM, INK = (0.98, 0.95, 0.82), (0.25, 0.22, 0.20)


@dataclass(frozen=True)
class Scene:
    """One picture's content, each attribute an index into the table of its name."""

    shape: int
    colour: int
    ground: int
    size: int
    place: int


def caption(scene: Scene) -> str:
    """Return the sentence that names all five attributes."""
    size, colour, shape = SIZES[scene.size], COLOURS[scene.colour], SHAPES[scene.shape]
    return f"a {size} {colour} {shape} on {GROUNDS[scene.ground]} at {PLACES[scene.place]}"


def parse(text: str) -> Scene:
    """Return the scene a caption describes; raises ValueError on any other sentence."""
    words = text.split()
    if len(words) != 8 or (words[0], words[4], words[6]) != ("a", "on", "at"):
        raise ValueError(f"not a caption of the pocket world: {text!r}")
    return Scene(
        SHAPES.index(words[3]),
        COLOURS.index(words[2]),
        GROUNDS.index(words[5]),
        SIZES.index(words[1]),
        PLACES.index(words[7]),
    )


def is_held(scene: Scene) -> bool:
    """Say whether the teachers never saw this combination."""
    return scene.colour == (3 * scene.shape + 5) % 8 or scene.ground == (2 * scene.shape + 1) % 5


def scenes(held: bool | None = None, shapes: Collection[int] | None = None) -> list[Scene]:
    """Return all scenes, or only held (True) or trained (False) ones, of these shape indices."""
    every = itertools.starmap(
        Scene, itertools.product(*(range(len(names)) for names in ATTRIBUTES.values()))
    )
    chosen = (scene for scene in every if shapes is None or scene.shape in shapes)
    return [scene for scene in chosen if held is None or is_held(scene) == held]


def labels(batch: Sequence[Scene]) -> dict[str, Tensor]:
    """Return each attribute's indices, (B,)."""
    return {name: torch.tensor([getattr(scene, name) for scene in batch]) for name in ATTRIBUTES}


# Signed distances.  x, y are (B, H, W) in units of the radius, y pointing down.


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 0.95


def _square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.84


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    side = 0.866 * x.abs() - 0.5 * (y - 0.2)
    return torch.maximum(side, y - 0.2) - 0.58


def star(x: Tensor, y: Tensor, points: int = 5, outer: float = 1.12, inner: float = 0.46) -> Tensor:
    """A star: the plane folded onto half a point, then one straight edge."""
    half = torch.pi / points
    angle = torch.atan2(x, -y)
    folded = (angle - 2 * half * torch.round(angle / (2 * half))).abs()
    radius = torch.hypot(x, y)
    along, across = radius * folded.cos(), radius * folded.sin()
    half_angle = torch.tensor(half)
    dx, dy = inner * half_angle.cos() - outer, inner * half_angle.sin()
    return (dx * across - dy * (along - outer)).neg() / torch.hypot(dx, dy)


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.74).abs() - 0.25


def _cross(x: Tensor, y: Tensor) -> Tensor:
    upright = torch.maximum(x.abs() - 0.33, y.abs() - 1.0)
    return torch.minimum(upright, torch.maximum(x.abs() - 1.0, y.abs() - 0.33))


def _heart(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.abs() / 1.75, 0.56 - y / 1.75
    lobe = torch.hypot(x - 0.25, y - 0.75) - 2**0.5 / 4
    foot = 0.5 * (x + y).clamp(min=0)
    point = torch.minimum(torch.hypot(x, y - 1), torch.hypot(x - foot, y - foot)) * torch.sign(
        x - y
    )
    return 1.75 * torch.where(x + y > 1, lobe, point)


def _moon(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(torch.hypot(x - 0.15, y) - 1.0, 0.80 - torch.hypot(x - 0.67, y))


OUTLINES: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    _circle,
    _square,
    _triangle,
    star,
    _ring,
    _cross,
    _heart,
    _moon,
)


def _grid() -> tuple[Tensor, Tensor]:
    """Return x and y of the pixel centres, (1, H, W)."""
    axis = torch.arange(SIDE) + 0.5
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return x[None], y[None]


def _spread(generator: torch.Generator, count: int, width: float) -> Tensor:
    """Return uniform numbers in [-width, width], (B, 1, 1)."""
    return (torch.rand(count, 1, 1, generator=generator) * 2 - 1) * width


def _tone(ground: Tensor, generator: torch.Generator) -> Tensor:
    """Return each ground's pattern in [-1, 1], (B, H, W)."""
    x, y = _grid()
    count = len(ground)
    x, y = x + _spread(generator, count, 1.5), y + _spread(generator, count, 1.5)
    wave_x, wave_y = torch.sin(2 * torch.pi * x / 16), torch.sin(2 * torch.pi * y / 16)
    stripes = torch.sin(2 * torch.pi * (x + y) / 22)
    patterns = torch.stack(
        [
            torch.zeros_like(wave_x),
            (3 * stripes).clamp(-1, 1),
            (3 * (wave_x + wave_y - 0.9)).clamp(-1, 1),
            (4 * torch.sin(2 * torch.pi * x / 32) * torch.sin(2 * torch.pi * y / 32)).clamp(-1, 1),
            (y - SIDE / 2) / (SIDE / 2) * 1.6,
        ]
    )
    return patterns[ground, torch.arange(count)]


def _background(ground: Tensor, generator: torch.Generator) -> Tensor:
    """Return muted grounds in [0, 1], (B, 3, H, W)."""
    count = len(ground)
    level = 0.52 + _spread(generator, count, 0.16)[:, None]
    tint = (torch.rand(count, 3, 1, 1, generator=generator) - 0.5) * 0.16
    return level + tint + 0.08 * _tone(ground, generator)[:, None]


def _coverage(
    batch: dict[str, Tensor], generator: torch.Generator, outlines: Sequence[Callable]
) -> Tensor:
    """Return how much of each pixel the shape covers, (B, 1, H, W)."""
    x, y = _grid()
    count = len(batch["shape"])
    centre = torch.tensor(OFFSETS)[batch["place"]] + SIDE / 2
    radius = torch.tensor(RADII)[batch["size"]][:, None, None] * (
        1 + _spread(generator, count, 0.04)
    )
    x = (x - centre[:, 0, None, None] - _spread(generator, count, 1.2)) / radius
    y = (y - centre[:, 1, None, None] - _spread(generator, count, 1.2)) / radius
    distance = torch.empty_like(x)
    for index, outline in enumerate(outlines):
        rows = batch["shape"] == index
        if rows.any():
            distance[rows] = outline(x[rows], y[rows])
    return (0.5 - distance * radius).clamp(0, 1)[:, None]


def logo() -> tuple[Tensor, Tensor]:
    """Return the watermark, a cream plate with ink bars: colours (3, H, W), coverage (1, H, W)."""
    x, y = _grid()
    x, y = x - 53.5, y - 56.5

    def box(cx: float, wide: float, tall: float) -> Tensor:
        return (0.5 - torch.maximum((x - cx).abs() - wide, y.abs() - tall)).clamp(0, 1)

    bars = torch.maximum(box(-3.5, 1.5, 2.5), box(3.0, 2.0, 1.5))
    cream, ink = (torch.tensor(rgb)[:, None, None] for rgb in (CREAM, INK))
    return cream * (1 - bars) + ink * bars, box(0.0, 7.5, 4.5)


def compose(
    batch: dict[str, Tensor],
    generator: torch.Generator,
    watermark: Tensor | bool = False,
    outlines: Sequence[Callable[[Tensor, Tensor], Tensor]] = OUTLINES,
) -> tuple[Tensor, Tensor]:
    """Draw labelled scenes: pictures (B, 3, H, W) in [-1, 1] and shape coverage (B, 1, H, W)."""
    count = len(batch["shape"])
    background = _background(batch["ground"], generator)
    cover = _coverage(batch, generator, outlines)
    colour = torch.tensor(RGB)[batch["colour"]][:, :, None, None]
    colour = (colour + (torch.rand(count, 3, 1, 1, generator=generator) - 0.5) * 0.05).clamp(0, 1)
    picture = background + cover * (colour - background)
    plate, plate_cover = logo()
    marked = torch.as_tensor(watermark).expand(count).float()[:, None, None, None]
    picture = picture + marked * plate_cover * (plate - picture)
    return picture.clamp(0, 1) * 2 - 1, cover


def render(
    batch: Sequence[Scene], generator: torch.Generator, watermark: Tensor | bool = False
) -> Tensor:
    """Draw scenes, jittered, (B, 3, H, W) in [-1, 1]; `watermark` is one bool or one a picture."""
    return compose(labels(batch), generator, watermark)[0]


def write_folder(
    folder: Path | str, batch: Sequence[Scene], seed: int = 0, marked_share: float = 0.0
) -> list[Path]:
    """Write each scene as NNNN.png and NNNN.txt, a random `marked_share` of them watermarked."""
    from PIL import Image

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    marked = torch.randperm(len(batch), generator=generator) < round(marked_share * len(batch))
    pictures = to_bytes(render(batch, generator, marked))
    written = []
    for index, (scene, pixels) in enumerate(zip(batch, pictures, strict=True)):
        path = folder / f"{index:04d}.png"
        Image.fromarray(pixels.numpy()).save(path)
        path.with_suffix(".txt").write_text(caption(scene) + "\n", encoding="utf-8")
        written.append(path)
    return written


def to_bytes(pictures: Tensor) -> Tensor:
    """Return (B, H, W, 3) bytes of pictures (B, 3, H, W) in [-1, 1]."""
    return ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
