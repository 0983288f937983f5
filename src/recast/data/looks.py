"""The ways a picture is shown: mirrored, cropped elsewhere, in slightly other colours.

Like the variants of a caption they are numbered, each a pure function of the picture's bytes and
the number, so that every one of them is encoded once and kept on disk.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from recast.data.batches import uniform
from recast.data.buckets import Fit, Size, fit
from recast.data.subset import Subset

if TYPE_CHECKING:
    from PIL.Image import Image

GAMMA, SATURATION, HUE = 0.1, 0.1, 6  # how far colours go: factors, and 256ths of the circle


def looks(size: Size, target: Size, how: Subset, image: str) -> tuple[Fit, ...]:
    """Return the ways to show a picture of `size` in its bucket; one where nothing varies it.

    image: the hash of its bytes. Where pictures are mirrored, every other way is.
    """
    plain = fit(size, target)
    moves = how.random_crop and plain.scaled != plain.target
    count = how.image_variants if moves or how.color_aug else 1
    if how.flip_aug:
        count = max(2, count)
    return tuple(one(plain, how, image, number) for number in range(count))


def one(plain: Fit, how: Subset, image: str, number: int) -> Fit:
    """Return way `number` to show a picture."""
    found = plain
    if how.random_crop:
        at = uniform(0, "left", image, number), uniform(0, "top", image, number)
        found = fit(plain.original, plain.target, at=at)
    if how.color_aug:
        dice = [2 * uniform(0, "colour", image, number, k) - 1 for k in range(3)]
        ends = zip(dice, (GAMMA, SATURATION, HUE), strict=True)
        found = replace(found, colour=tuple(round(end * die, 4) for die, end in ends))
    return replace(found, flipped=how.flip_aug and number % 2 == 1)


def varied(picture: Image, plan: Fit) -> Image:
    """Mirror an RGB picture and change its colours, as its plan says."""
    from PIL import ImageEnhance
    from PIL.Image import Transpose, merge

    if plan.flipped:
        picture = picture.transpose(Transpose.FLIP_LEFT_RIGHT)
    if not plan.colour or picture.mode != "RGB":
        return picture
    gamma, saturation, hue = plan.colour
    curve = [round(255 * (value / 255) ** (1 + gamma)) for value in range(256)]
    picture = ImageEnhance.Color(picture.point(curve * 3)).enhance(1 + saturation)
    hues, *others = picture.convert("HSV").split()
    hues = hues.point([(value + round(hue)) % 256 for value in range(256)])
    return merge("HSV", (hues, *others)).convert("RGB")
