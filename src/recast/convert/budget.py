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


def plan_of(material: Material) -> Plan | None:
    """The order of the images, None where there are none."""
    images = getattr(material, "images", material)
    dataset = getattr(images, "dataset", None)
    return None if dataset is None else dataset.plan


def steps_in(material: Material, recipe: Recipe, rounds: float) -> int:
    """How many steps so many rounds through the images take, the last one begun included.

    Raises Refused where there are no images. In a mix only `mix_share` of the batches are of them.
    """
    from recast.data.batches import batches_before

    plan, how = plan_of(material), recipe.train
    if plan is None:
        raise Refused("rounds are counted through images, and there are none: give steps instead.")
    whole = batches_before(plan, math.floor(rounds), how.batch)
    rest = (rounds % 1) * len(plan) / how.batch
    share = recipe.data.mix_share if hasattr(material, "images") else 1.0
    return max(1, math.ceil(round((whole + rest) / share / how.accumulate, 6)))


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
    return override(recipe, train=changes) if changes else recipe


def check(recipe: Recipe, *, images: bool) -> None:
    """Refuse rounds through images that there are not."""
    how = recipe.train
    if not images and (how.max_epochs or how.warmup_epochs):
        key = "max_epochs" if how.max_epochs else "warmup_epochs"
        raise Refused(
            f"train.{key} counts rounds through images, and there are none: give --images, or "
            "count in steps."
        )
