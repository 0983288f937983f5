"""Reading a picture so that the trainer sees what a viewer shows, or refusing it by name.

EXIF orientation is applied, transparency is composed onto a stated colour, 16-bit grey is scaled
(Pillow alone clips it), CMYK is converted without its profile, of an animation the first frame is
taken.  Colour profiles are not applied.  Nothing above PIXELS is decoded.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from recast.errors import NoRoom, Refused

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

PIXELS = 64_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
)
ORIENTATION = 0x0112
WHITE = (255, 255, 255)


class Packed(Protocol):
    """A picture that is no file of its own; as text, where it is."""

    def read(self) -> bytes:
        """Return its bytes; raises OSError and Refused."""


Picture = Path | Packed


def bytes_of(picture: Picture, most: int = -1) -> bytes:
    """Return a picture's bytes, the first `most` of them."""
    if not isinstance(picture, Path):
        return picture.read()[: most if most >= 0 else None]
    with picture.open("rb") as file:
        return file.read(most)


@dataclass(frozen=True)
class Header:
    """What a picture's header says; `size` is (width, height) after EXIF orientation."""

    size: tuple[int, int]
    format: str
    notes: tuple[str, ...] = ()


@cache
def readers() -> tuple[str, ...]:
    """Return those of FORMATS that this Pillow can read."""
    import PIL.Image

    PIL.Image.init()
    return tuple(name for name in FORMATS if name in PIL.Image.OPEN)


@contextmanager
def opened(path: Picture) -> Iterator[Image]:
    """Open a picture without decoding it; any failure inside names the file.

    Pillow's readers raise whatever their parsing runs into (OSError, ValueError, SyntaxError,
    struct.error, KeyError, ...), so every exception of a decode means one thing: this file cannot
    be read.
    """
    import PIL.Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
            warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
            file = path if isinstance(path, Path) else io.BytesIO(path.read())
            with PIL.Image.open(file, formats=readers()) as picture:
                limit(path, picture.size)
                yield picture
    except Refused:
        raise
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
        raise Refused(f"{path}: more than {PIXELS // 10**6} megapixels; scale it down.") from error
    except MemoryError as error:
        raise NoRoom(f"{path}: not enough memory to decode it.") from error
    except Exception as error:
        raise Refused(f"{path}: {reason(path, error)}") from error


def limit(path: Picture, size: tuple[int, int]) -> None:
    """Refuse a picture that is empty or above the cap."""
    if min(size) < 1:
        raise Refused(f"{path}: the picture has no pixels ({size[0]}x{size[1]}).")
    if size[0] * size[1] > PIXELS:
        raise Refused(
            f"{path}: {size[0]}x{size[1]} is more than {PIXELS // 10**6} megapixels; scale it down."
        )


def reason(path: Picture, error: Exception) -> str:
    """Say in words why a picture cannot be read."""
    if isinstance(error, OSError) and error.errno is not None:
        return f"cannot be read ({error.strerror})."
    try:
        head = bytes_of(path, 64)
    except OSError as unreadable:
        return f"cannot be read ({unreadable.strerror})."
    if not head:
        return "the file is empty."
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "this is a web page, not a picture; download the picture itself."
    said = " ".join(str(error).split())[:100]
    if type(error).__name__ == "UnidentifiedImageError" or not said:
        said = "no reader knows the format"
    return f"the picture is broken ({said}); replace or remove it."


def header(path: Picture) -> Header:
    """Read format and size; decodes nothing, so that a truncated body is found only by `load`."""
    with opened(path) as picture:
        width, height = picture.size
        # PngImageFile.getexif decodes the whole file when there is no EXIF block before the pixels
        exif = picture.getexif() if picture.format != "PNG" or "exif" in picture.info else {}
        if exif.get(ORIENTATION, 1) in (5, 6, 7, 8):
            width, height = height, width
        return Header((width, height), str(picture.format), tuple(notes(picture)))


def notes(picture: Image) -> Iterator[str]:
    """Yield what will be done to a picture that a plain reader would do otherwise."""
    if picture.format != "MPO" and getattr(picture, "is_animated", False):
        yield f"animated: the first of {getattr(picture, 'n_frames', 1)} frames is used"
    if transparent(picture):
        yield "transparent: composed onto the background colour"
    if picture.mode.startswith("I"):
        yield "16-bit grey: scaled to 8 bits"
    if picture.mode == "CMYK":
        yield "CMYK: converted without its colour profile"


def transparent(picture: Image) -> bool:
    """True where a picture has an alpha channel or a transparent palette entry."""
    return picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info


def load(path: Picture, *, background: tuple[int, int, int] = WHITE) -> Image:
    """Decode a picture as 8-bit RGB, upright; refuses by name what cannot be read whole."""
    from PIL import ImageOps

    with opened(path) as picture:
        picture.seek(0)
        picture.load()
        return to_rgb(ImageOps.exif_transpose(picture), background, path)


def to_rgb(picture: Image, background: tuple[int, int, int], path: Picture) -> Image:
    """Return a picture of any mode as RGB, unclipped, without colours hidden under alpha."""
    import PIL.Image

    if picture.mode.startswith("I"):
        picture = grey_from_16_bit(picture, path)
    if picture.mode == "F":
        raise Refused(
            f"{path}: floating-point pixels have no stated range; save it as 8 or 16 bit."
        )
    if not transparent(picture):
        return picture.convert("RGB")
    layer = picture.convert("RGBA")
    ground = PIL.Image.new("RGBA", layer.size, (*background, 255))
    return PIL.Image.alpha_composite(ground, layer).convert("RGB")


def grey_from_16_bit(picture: Image, path: Picture) -> Image:
    """Scale 0..65535 to 0..255; refuses 32-bit grey, whose range is unknown."""
    import numpy as np
    import PIL.Image

    values = np.asarray(picture).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise Refused(f"{path}: 32-bit grey pixels have no stated range; save it as 8 or 16 bit.")
    return PIL.Image.fromarray(((values + 128) // 257).astype(np.uint8))


def to_tensor(picture: Image) -> Tensor:
    """Return an RGB picture as (3, H, W) float32 in [-1, 1]."""
    import numpy as np
    import torch

    pixels = torch.from_numpy(np.array(picture, dtype=np.uint8))
    return pixels.permute(2, 0, 1).float().div_(127.5).sub_(1.0)
