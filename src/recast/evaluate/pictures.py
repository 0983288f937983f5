"""Pictures between tensors, PNG bytes and the before-and-after sheet."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from recast.evaluate.values import Shot

if TYPE_CHECKING:
    from PIL import Image, ImageFont
    from torch import Tensor


def png(picture: Tensor) -> bytes:
    """Encode a picture (3, H, W) in [-1, 1]; what lies outside is cut off."""
    from PIL import Image

    pixels = ((picture.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte()
    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def shots(
    captions: Sequence[str],
    seeds: Sequence[int],
    originals: Sequence[Tensor],
    converted: Sequence[Tensor],
    wrong: Sequence[Tensor] = (),
) -> tuple[Shot, ...]:
    """Encode pictures (3, H, W) that belong together; `wrong` may be shorter or empty."""
    return tuple(
        Shot(caption, seed, png(a), png(b), png(wrong[k]) if k < len(wrong) else None)
        for k, (caption, seed, a, b) in enumerate(
            zip(captions, seeds, originals, converted, strict=True)
        )
    )


def size_of(data: bytes) -> tuple[int, int]:
    """Width and height of a PNG, from its header."""
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def embedded(data: bytes, *, longest: int = 512) -> str:
    """A PNG as a data URI: as it is if small, else scaled to `longest` pixels as WebP."""
    from PIL import Image

    kind, longer = "png", max(size_of(data))
    if longer > longest:
        picture = Image.open(io.BytesIO(data)).convert("RGB")
        size = (picture.width * longest // longer, picture.height * longest // longer)
        buffer = io.BytesIO()
        picture.resize(size, Image.Resampling.LANCZOS).save(buffer, "WEBP", quality=90)
        kind, data = "webp", buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def sheet(
    pictures: Sequence[Shot], names: Sequence[str], *, side: int = 128, gap: int = 8
) -> bytes:
    """Lay shots out as one PNG: a column per prompt, rows original, converted, old sampler.

    `names` are the rows' labels, written at the left; pictures are scaled to `side` pixels.
    """
    from PIL import Image, ImageDraw

    rows = ("original", "converted", "wrong")[: len(names)]
    font = _font(side // 8)
    label = max(int(font.getlength(name)) for name in names) + 2 * gap
    size = (label + len(pictures) * (side + gap), len(rows) * (side + gap) + gap)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for j, (row, name) in enumerate(zip(rows, names, strict=True)):
        top = gap + j * (side + gap)
        draw.text((gap, top + side // 2), name, fill="#333333", anchor="lm", font=font)
        for k, shot in enumerate(pictures):
            data = getattr(shot, row)
            if data is not None:
                canvas.paste(_scaled(data, side), (label + k * (side + gap), top))
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG")
    return buffer.getvalue()


def _scaled(data: bytes, side: int) -> Image.Image:
    from PIL import Image

    picture = Image.open(io.BytesIO(data)).convert("RGB")
    small = max(picture.size) <= side
    return picture.resize(
        (side, side), Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
    )


def _font(size: int) -> ImageFont.FreeTypeFont:
    from pathlib import Path

    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(
        str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), size
    )
