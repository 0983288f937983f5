"""The settings of one folder of images, in kohya's words, and the sizes it is trained in.

A setting comes from the folder's own table in a dataset file, else from its dataset, else from
`[general]`, else from the recipe's section `images`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from recast.data.buckets import Buckets, Size, aspects, square

if TYPE_CHECKING:
    from pathlib import Path

BUCKETED = 256  # pixels of a side from which pictures keep their aspect
Missing = Literal["empty", "refuse", "skip"]


@dataclass(frozen=True)
class Sizes:
    """The buckets of a dataset; without a resolution, the side that the model is trained at."""

    resolution: Size | None = None
    enable_bucket: bool | Literal["auto"] = "auto"
    min_bucket_reso: int = 0
    max_bucket_reso: int = 0
    bucket_reso_steps: int = 64
    bucket_no_upscale: bool = False

    @lru_cache(maxsize=64)  # noqa: B019 (a frozen value)
    def table(self, side: int) -> Buckets:
        """The buckets; refuses settings that leave none."""
        width, height = self.resolution or (side, side)
        whole = math.isqrt(width * height)
        on = whole >= BUCKETED if self.enable_bucket == "auto" else self.enable_bucket
        if on:
            return aspects(
                whole, low=self.min_bucket_reso, high=self.max_bucket_reso,
                step=self.bucket_reso_steps, upscale=not self.bucket_no_upscale,
            )  # fmt: skip
        if width == height:
            return square(width)
        for one in (width, height):
            square(one)
        return Buckets(((width, height),), width * height, 8)


@dataclass(frozen=True)
class Subset:
    """How the pictures and captions of a folder are read, varied and weighed.

    `caption_dropout_rate` None is the recipe's own; `conditioning_data_dir` holds masks of the
    same names; `loss_weight` of a regularisation folder is the recipe's prior_loss_weight.
    """

    image_dir: Path | None = None
    metadata_file: Path | None = None
    num_repeats: int | None = None
    is_reg: bool = False
    loss_weight: float = 1.0
    class_tokens: str = ""
    caption_extension: str = ""
    on_missing_caption: Missing = "empty"
    shuffle_caption: bool = False
    keep_tokens: int = 0
    keep_tokens_separator: str = ""
    caption_separator: str = ","
    secondary_separator: str = ""
    enable_wildcard: bool = False
    caption_prefix: str = ""
    caption_suffix: str = ""
    caption_dropout_rate: float | None = None
    caption_dropout_every_n_epochs: int = 0
    caption_tag_dropout_rate: float = 0.0
    caption_variants: int = 8
    flip_aug: bool = False
    color_aug: bool = False
    random_crop: bool = False
    image_variants: int = 4
    alpha_mask: bool = False
    conditioning_data_dir: Path | None = None
    sizes: Sizes = Sizes()

    @property
    def masked(self) -> bool:
        """Whether places of its pictures count differently in the loss."""
        return self.alpha_mask or self.conditioning_data_dir is not None

    @property
    def stated(self) -> str:
        """The settings in words, but for where files lie, which is no part of what is learnt."""
        return repr(replace(self, image_dir=None, metadata_file=None, conditioning_data_dir=None))


PLAIN = Subset()


def from_recipe(images: Any) -> Subset:
    """The settings that a recipe's section `images` gives to every folder."""
    from pathlib import Path

    taken = images.model_dump()
    sizes = {name: taken.pop(name) for name in Sizes.__dataclass_fields__ if name in taken}
    masks = taken.pop("masks")
    taken.pop("prior_loss_weight")
    return Subset(
        **taken, sizes=Sizes(**sizes), conditioning_data_dir=Path(masks) if masks else None
    )
