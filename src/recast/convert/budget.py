"""When a run ends: by steps, by rounds through the images, by the clock.

A bound of rounds becomes a number of steps before training, so that schedules know their length.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from recast.errors import Refused
from recast.recipe import Recipe, override

if TYPE_CHECKING:
    from recast.convert.material import Material
    from recast.data.batches import Plan


# keys that count rounds, and those of steps that they stand in for
OFTEN = (
    ("watch", "validate_epochs", "validate_every"),
    ("watch", "previews_epochs", "previews_every"),
    ("save", "epochs", "every"),
)


def plan_of(material: Material) -> Plan | None:
    """The order of the images, None where there are none."""
    images = getattr(material, "images", material)
    dataset = getattr(images, "dataset", None)
    return None if dataset is None else dataset.plan


def steps_in(material: Material, recipe: Recipe, rounds: float) -> int:
    """How many steps so many rounds through the images take, the last one begun included."""
    return max(1, math.ceil(round(exactly(material, recipe, rounds), 6)))


def exactly(material: Material, recipe: Recipe, rounds: float) -> float:
    """How many steps, and which part of one, so many rounds through the images take.

    Raises Refused where there are no images. In a mix only `mix_share` of the batches are of them.
    """
    from recast.data.batches import batches_before

    plan, how = plan_of(material), recipe.train
    if plan is None:
        raise Refused("rounds are counted through images, and there are none: give steps instead.")
    whole = batches_before(plan, math.floor(rounds), how.batch)
    rest = (rounds % 1) * len(plan) / how.batch
    share = recipe.data.mix_share if hasattr(material, "images") else 1.0
    return (whole + rest) / share / how.accumulate


def settled(recipe: Recipe, material: Material) -> Recipe:
    """The recipe with its rounds as steps."""
    how = recipe.train
    changes: dict[str, int] = {}
    if how.warmup_epochs:
        changes["warmup"] = steps_in(material, recipe, how.warmup_epochs)
    if how.max_epochs:
        most = max(how.min_steps, steps_in(material, recipe, how.max_epochs))
        key = "steps" if isinstance(how.steps, int) else "max_steps"
        changes[key] = min(how.limit, most)
    recipe = override(recipe, train=changes) if changes else recipe
    others: dict[str, dict[str, int]] = {}
    for section, rounds, steps in OFTEN:
        count = getattr(getattr(recipe, section), rounds)
        if count:
            found = max(1, round(exactly(material, recipe, count)))
            others.setdefault(section, {})[steps] = found
    return override(recipe, **others) if others else recipe


def check(recipe: Recipe, *, images: bool) -> None:
    """Refuse rounds through images that there are not."""
    keys = [("train", "max_epochs"), ("train", "warmup_epochs"), *(each[:2] for each in OFTEN)]
    for section, key in keys if not images else ():
        if getattr(getattr(recipe, section), key):
            raise Refused(
                f"{section}.{key} counts rounds through images, and there are none: give --images, "
                "or count in steps."
            )
