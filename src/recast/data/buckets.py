"""Aspect buckets: the sizes a data set is trained in, and how a picture is fitted into its bucket.

A picture is scaled to cover its bucket and cropped; SDXL is told of both (Podell et al. 2023,
2.2): the size before scaling, the crop's top left corner in the scaled picture, the size that
remains.  Sizes are (width, height) throughout, the model's size ids (height, width).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from recast.errors import Refused

if TYPE_CHECKING:
    from PIL.Image import Image

Size = tuple[int, int]


@dataclass(frozen=True)
class Fit:
    """Scale a picture of `original` size to `scaled`, cut `target` at `corner` (left, top).

    Then mirror it, and change its brightness, saturation and hue by `colour`, none by ().
    """

    original: Size
    scaled: Size
    corner: Size
    target: Size
    flipped: bool = False
    colour: tuple[float, ...] = ()

    @property
    def ids(self) -> tuple[int, int, int, int, int, int]:
        """SDXL's size ids: original (H, W), crop (top, left), target (H, W).

        A mirrored crop is one of the mirrored picture, where its left edge was the right one.
        """
        (w, h), (left, top), (tw, th) = self.original, self.corner, self.target
        if self.flipped:
            left = self.scaled[0] - left - tw
        return h, w, top, left, th, tw

    @property
    def key(self) -> list[object]:
        """What an entry's name says of it; a plain fit's is as it was before there were others."""
        plain: list[object] = [self.original, self.scaled, self.corner, self.target]
        return [*plain, self.flipped, self.colour] if self.flipped or self.colour else plain


@dataclass(frozen=True)
class Buckets:
    """Sizes of about `area` pixels; without upscaling, small pictures get their own size."""

    sizes: tuple[Size, ...]
    area: int
    step: int
    upscale: bool = True

    def choose(self, size: Size) -> Size:
        """Return a picture's bucket: the nearest aspect ratio, on a tie the larger, wider one."""
        if not self.upscale:
            own = self.without_upscaling(size)
            if own is not None:
                return own
        ratio = math.log(size[0] / size[1])
        return min(
            self.sizes, key=lambda b: (abs(math.log(b[0] / b[1]) - ratio), -b[0] * b[1], -b[0])
        )

    def without_upscaling(self, size: Size) -> Size | None:
        """Return the size cut down to whole steps where the bucket would enlarge it, else None."""
        if len(self.sizes) > 1 and size[0] * size[1] >= self.area:
            return None
        if len(self.sizes) == 1 and all(s >= b for s, b in zip(size, self.sizes[0], strict=True)):
            return None
        width, height = (side // self.step * self.step for side in size)
        if min(width, height) < self.step:
            raise Refused(
                f"A picture of {size[0]}x{size[1]} is smaller than one bucket step of {self.step}: "
                "allow upscaling or remove it."
            )
        return width, height


def square(side: int, *, step: int = 8) -> Buckets:
    """Return the single bucket of side x side."""
    checked(side, side, side, step)
    return Buckets(((side, side),), side * side, step)


def aspects(
    side: int,
    *,
    low: int | None = None,
    high: int | None = None,
    step: int = 64,
    upscale: bool = True,
) -> Buckets:
    """Return the sizes of whole steps, in [low, high] (side/2 to 2 side), of at most side² pixels.

    For every width the tallest height that fits; widths and heights change places, so the set is
    symmetric.  Refuses settings that leave no bucket.
    """
    low, high = low or side // 2, high or side * 2
    checked(side, low, high, step)
    area, found = side * side, set()
    whole = math.isqrt(area) // step * step
    if low <= whole <= high:
        found.add((whole, whole))
    for width in range(-(-low // step) * step, high + 1, step):
        height = min(high // step * step, area // width // step * step)
        if height >= low:
            found |= {(width, height), (height, width)}
    if not found:
        raise Refused(
            f"No bucket between {low} and {high} pixels in steps of {step} has an area near "
            f"{side}x{side}: widen the limits."
        )
    return Buckets(tuple(sorted(found)), area, step, upscale)


def checked(side: int, low: int, high: int, step: int) -> None:
    """Refuse bucket settings that cannot be meant."""
    if step < 8 or step % 8:
        raise Refused(f"A bucket step of {step} does not suit the VAE: use a multiple of 8.")
    if not 0 < low <= high or not step <= side <= 16384:
        raise Refused(
            f"Bucket settings size {side}, min {low}, max {high}, step {step} contradict "
            "each other: step <= size, and min <= max, are needed."
        )
    if low == high and side % step:
        raise Refused(f"The size {side} is no multiple of the bucket step {step}.")


def fit(size: Size, target: Size, *, at: tuple[float, float] = (0.5, 0.5)) -> Fit:
    """Plan the smallest scaling of `size` that covers `target`; `at` places the crop, 0 to 1."""
    scale = max(target[0] / size[0], target[1] / size[1])
    width = max(target[0], round(size[0] * scale))
    height = max(target[1], round(size[1] * scale))
    left, top = round((width - target[0]) * at[0]), round((height - target[1]) * at[1])
    return Fit(size, (width, height), (left, top), target)


def apply(picture: Image, plan: Fit) -> Image:
    """Scale, crop and vary a picture by its plan: area filter (Lanczos) unless the size stays."""
    from PIL.Image import Resampling

    if picture.size != plan.scaled:
        picture = picture.resize(plan.scaled, Resampling.LANCZOS)
    (left, top), (width, height) = plan.corner, plan.target
    if picture.size != plan.target:
        picture = picture.crop((left, top, left + width, top + height))
    if plan.flipped or plan.colour:
        from recast.data.looks import varied

        picture = varied(picture, plan)
    return picture
