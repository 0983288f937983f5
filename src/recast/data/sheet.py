"""The contact sheet: pictures as the trainer sees them, cropped and varied, with what is said.

A PNG, or a page that needs nothing else: no script, no request, captions as text.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from recast.commit import commit
from recast.data.buckets import Fit, apply
from recast.data.captions import said, variants
from recast.data.folder import Example
from recast.data.images import load
from recast.data.looks import looks
from recast.data.masks import mask_of
from recast.data.survey import Survey
from recast.errors import Refused

if TYPE_CHECKING:
    from PIL.Image import Image

SHOWN, CELL, COLUMNS, LINES = 48, 192, 6, 3
GREY, MUTED, INK = (120, 120, 120), (111, 107, 100), (29, 28, 26)


@dataclass(frozen=True)
class Tile:
    """One picture as it is trained on, and the words that go with it."""

    picture: Image
    caption: str
    name: str
    about: str


def write_sheet(
    path: Path, examples: Sequence[Example], facts: Survey, side: int, *, force: bool = False
) -> None:
    """Write a sheet of up to SHOWN pictures, spread evenly over the source, as .png or .html."""
    if path.suffix.lower() not in (".png", ".html"):
        raise Refused(f"--sheet {path}: give a file ending in .html or .png.")
    made = list(tiles(chosen(examples), side))
    body = page(made, facts).encode() if path.suffix.lower() == ".html" else grid(made)
    commit(path, lambda file: file.write(body), size=len(body), force=force)


def chosen(examples: Sequence[Example]) -> list[Example]:
    """Examples spread evenly over the source."""
    count = min(SHOWN, len(examples))
    return [examples[k * len(examples) // count] for k in range(count)]


def tiles(examples: Sequence[Example], side: int) -> Iterator[Tile]:
    """Show every example in one of the ways that it is trained in, another one each time."""
    for number, example in enumerate(examples):
        try:
            picture = load(example.path)
        except Refused:
            continue
        target = example.how.sizes.table(side).choose(picture.size)
        ways = looks(picture.size, target, example.how, str(number))
        way = ways[number % len(ways)]
        shown = apply(picture, way)
        if example.how.masked:
            shown = greyed(shown, example, way)
        count = variants(example.caption, example.how)
        (width, height), (w, h) = way.target, way.original
        about = f"{w}x{h} to {width}x{height}" + (", mirrored" if way.flipped else "")
        about += f", {len(ways)} ways" if len(ways) > 1 else ""
        about += f", {count} captions" if count > 1 else ""
        text = said(example.caption, example.how, number % count)
        yield Tile(thumbnail(shown), text, example.name, about)


def greyed(picture: Image, example: Example, way: Fit) -> Image:
    """Lay grey over what the mask leaves out."""
    import PIL.Image

    mask = mask_of(example, way, 1)[0].mul(255).byte().numpy()
    ground = PIL.Image.new("RGB", picture.size, GREY)
    return PIL.Image.composite(picture, ground, PIL.Image.fromarray(mask))


def thumbnail(picture: Image) -> Image:
    """Scale a picture to the cell, keeping its shape."""
    from PIL.Image import Resampling

    scale = CELL / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Resampling.LANCZOS if scale < 1 else Resampling.NEAREST)


def grid(made: Sequence[Tile]) -> bytes:
    """The sheet as a PNG: pictures in rows, a few lines of words under each."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(12)
    line, gap = 15, 14
    width, height = CELL + gap, CELL + line * (LINES + 1) + gap
    rows = -(-len(made) // COLUMNS)
    sheet = Image.new("RGB", (gap + COLUMNS * width, gap + max(1, rows) * height), (250, 249, 246))
    pen = ImageDraw.Draw(sheet)

    def length(text: str) -> float:
        return pen.textlength(text, font=font)

    for k, tile in enumerate(made):
        left, top = gap + k % COLUMNS * width, gap + k // COLUMNS * height
        place = (left + (CELL - tile.picture.width) // 2, top + (CELL - tile.picture.height) // 2)
        sheet.paste(tile.picture, place)
        words = wrapped(tile.caption or "(no caption)", CELL, length)
        lines = [(cut(tile.about, CELL, length), MUTED), *((text, INK) for text in words)]
        for n, (text, colour) in enumerate(lines):
            pen.text((left, top + CELL + 2 + line * n), text, fill=colour, font=font)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def wrapped(text: str, width: float, length: Callable[[str], float]) -> list[str]:
    """Break a text into LINES lines of a width at most, the last one cut off with an ellipsis."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if length(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > LINES:
        lines = [*lines[: LINES - 1], f"{lines[LINES - 1]} …"]
    return [cut(one, width, length) for one in lines]


def cut(text: str, width: float, length: Callable[[str], float]) -> str:
    """A text, cut off with an ellipsis where it is too wide."""
    while len(text) > 1 and length(text) > width:
        text = text[:-2].rstrip() + "…"
    return text


def page(made: Sequence[Tile], facts: Survey) -> str:
    """The sheet as one HTML page."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("recast.data"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    most = max((bucket.samples for bucket in facts.buckets), default=1)
    shown = [(tile, embedded(tile.picture)) for tile in made]
    return environment.get_template("sheet.html.j2").render(facts=facts, tiles=shown, most=most)


def embedded(picture: Image) -> str:
    """A thumbnail as a data URI."""
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
