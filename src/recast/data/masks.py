"""What each place of a picture counts in the loss: an alpha channel, or a grey picture beside.

White or opaque counts whole, black or transparent nothing.  A mask is scaled, cropped and mirrored
as its picture is, then averaged over the pixels of each latent.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from recast.data.buckets import Fit, apply, fit
from recast.data.images import SUFFIXES, opened, transparent
from recast.data.subset import Subset
from recast.errors import Refused

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from recast.data.folder import Example


def masks_of(how: Subset) -> dict[str, Path] | None:
    """The masks of a folder by name inside it, without suffix; None where no folder is named."""
    root = how.conditioning_data_dir
    if root is None:
        return None
    if not root.is_dir():
        raise Refused(f"{root}: no such folder of masks.")
    found: dict[str, Path] = {}
    for place, _, names in os.walk(root):
        for name in sorted(names):
            stem, suffix = os.path.splitext(name)  # noqa: PTH122
            if suffix.lower() in SUFFIXES and name[0] != ".":
                inner = (Path(place) / stem).relative_to(root).as_posix()
                if inner in found:
                    raise Refused(f"{root}: {inner} has two masks; keep one.")
                found[inner] = Path(place) / name
    return found


def mask_of(example: Example, planned: Fit, factor: int) -> Tensor:
    """Return the mask of a picture's latent, (1, h, w) in [0, 1].

    A file's mask and an alpha channel multiply. Raises Refused by name for a mask of another shape
    than its picture, and for one that is black all over: such a picture teaches nothing.
    """
    import numpy as np
    import torch

    found = None
    for picture in pictures(example, planned):
        grey = torch.from_numpy(np.asarray(picture).copy()).float().div_(255)
        found = grey if found is None else found * grey
    if found is None:
        width, height = planned.target
        return torch.ones(1, height // factor, width // factor)
    mask = torch.nn.functional.avg_pool2d(found[None, None], factor)[0]
    if not mask.any():
        where = example.mask or example.path
        raise Refused(f"{where}: the mask is empty in the part that is trained; mend or remove it.")
    return mask


def pictures(example: Example, planned: Fit) -> list[Image]:
    """The grey pictures that make up a mask, fitted as the picture itself is."""
    from PIL import ImageOps

    found: list[Image] = []
    if example.mask is not None:
        with opened(example.mask) as picture:
            picture.load()
            found.append(fitted(ImageOps.exif_transpose(picture).convert("L"), example, planned))
    if example.how.alpha_mask:
        with opened(example.path) as picture:
            picture.load()
            if transparent(picture):
                upright = ImageOps.exif_transpose(picture).convert("RGBA")
                found.append(fitted(upright.getchannel("A"), example, planned))
    return found


def fitted(picture: Image, example: Example, planned: Fit) -> Image:
    """Scale, crop and mirror a mask as the picture is; a mask may have another resolution."""
    (width, height), (w, h) = planned.original, picture.size
    if abs(width * h - height * w) > max(width, height) * max(2, w / 100):
        raise Refused(
            f"{example.mask}: is {w}x{h} and its picture {width}x{height}: give both one shape."
        )
    if picture.size != planned.original:
        picture = picture.resize(planned.original)
    if planned.scaled == (0, 0):
        planned = fit(picture.size, planned.target)
    return apply(picture, planned)
