"""Where on the path a step's samples lie, and the noise they get: the recipe's times and noise.

Both are pure functions of (seed, step), and loss-aware times of what was learnt before that step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from recast import processes
from recast.objective import Objective
from recast.recipe import Recipe
from recast.timesteps import TIMES, resolution_shift, shift
from recast.train import Aware, Draw, noised, seeded
from recast.train.noise import multires, offset, paired, perturbed

if TYPE_CHECKING:
    from torch import Tensor

    from recast.text.encode import Condition

EVEN = ("uniform", "stratified")


def times(recipe: Recipe, step: int, aware: Aware | None = None) -> tuple[Tensor, Tensor | None]:
    """(t, weight) of one optimizer step, before any shift: drawn together, for all micro-batches.

    The weight is None but for loss-aware times, which it makes up for.
    """
    how = recipe.train
    generator = seeded(how.seed, "times", step)
    count = how.batch * how.accumulate
    if aware is not None:
        return aware.draw(count, generator)
    options = {"mean": how.mean, "std": how.std} if how.times.endswith("logit-normal") else {}
    return TIMES[how.times](count, generator=generator, **options), None


def dealt(
    recipe: Recipe, step: int, aware: Aware | None = None
) -> list[tuple[Tensor, Tensor | None]]:
    """The times of one optimizer step and their weights, micro-batch by micro-batch."""
    how = recipe.train
    t, weight = times(recipe, step, aware)
    weights = [None] * how.accumulate if weight is None else weight.split(how.batch)
    return list(zip(t.split(how.batch), weights, strict=True))


def drawn(
    recipe: Recipe,
    draw: Callable[[int, Tensor, Tensor | None], Draw],
    done: int,
    aware: Aware | None = None,
) -> Iterator[Draw]:
    """This process's draws from the first one of step `done` on: draw(number, times, weight)."""
    how = recipe.train
    for step in range(done, how.limit):
        for number, (t, weight) in enumerate(dealt(recipe, step, aware), step * how.accumulate):
            if processes.mine(number):
                yield draw(number, t, weight)


def shifted(recipe: Recipe, t: Tensor, pixels: int) -> Tensor:
    """Times moved by the recipe's shift, for pictures of so many pixels."""
    how = recipe.train
    return shift(t, how.shift * resolution_shift(pixels, how.shift_side))


def aimed(recipe: Recipe) -> bool:
    """Whether the recipe asks for other times than even ones."""
    how = recipe.train
    return how.times not in EVEN or how.shift != 1 or how.shift_side > 0


def noise(recipe: Recipe, x0: Tensor, number: int) -> Tensor:
    """The noise of batch `number`, as the recipe's section has it."""
    how, seed = recipe.noise, recipe.train.seed
    eps = torch.randn(x0.shape, generator=seeded(seed, "noise", number)).to(x0)
    if how.multires:
        source = seeded(seed, "multires", number)
        eps = multires(eps, how.multires, how.multires_discount, source)
    if how.offset:
        eps = offset(eps, how.offset, seeded(seed, "offset", number))
    return paired(eps, x0) if how.pairing == "optimal" else eps


def remarks(recipe: Recipe) -> Iterator[str]:
    """What a user should know of the noise that was asked for."""
    if recipe.noise.pairing == "optimal" and recipe.train.batch == 1:
        yield "noise.pairing deals noises out within a batch; at train.batch 1 it has no effect."


def draw(
    recipe: Recipe,
    objective: Objective,
    number: int,
    x0: Tensor,
    t: Tensor,
    weight: Tensor | None,
    condition: Condition,
    index: Tensor,
    factor: int = 8,
) -> Draw:
    """Batch `number`: data noised as the recipe says, at t after its shift.

    `factor` is how many pixels wide one latent is.
    """
    eps, amount = noise(recipe, x0, number), recipe.noise.perturbation
    t = shifted(recipe, t, x0[0, 0].numel() * factor**2)
    made = noised(objective, x0, t.to(eps), eps, condition, index)
    if amount:
        source = seeded(recipe.train.seed, "perturbation", number)
        made = perturbed(objective, made, amount, source)
    return made if weight is None else replace(made, weight=weight.to(eps))
