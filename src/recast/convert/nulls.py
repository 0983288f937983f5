"""The null condition in the report: both kinds, by the original and by the converted model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recast.convert.fixed import batch_of
from recast.evaluate.bound import latents, noises, pictures
from recast.evaluate.null import null_distance, nulls
from recast.evaluate.pictures import shots
from recast.evaluate.values import Null, NullLevel, Shot
from recast.text.encode import cat

if TYPE_CHECKING:
    from recast.convert import Job
    from recast.convert.compose import Test
    from recast.model import Model

NOISES = 2  # pictures of each kind
MEASURED = 4  # latents that the distance is measured on
KINDS = ("empty prompt", "zeroed conditioning")


@dataclass(frozen=True)
class Side:
    """One model's distances, and its pictures (3, H, W): the empty prompt's, then zeros'."""

    levels: tuple[NullLevel, ...]
    images: list[Tensor]


def side(model: Model, job: Job, test: Test) -> Side:
    """Measure and paint without any prompt, both ways, from the first seeds of the report."""
    how = job.recipe.evaluate
    both, seeds = nulls(model), test.seeds[:NOISES]
    eps = noises(model.latent_shape(), (*seeds, *seeds)).to(model.device)
    condition = cat([both.empty] * len(seeds) + [both.zero] * len(seeds))
    with torch.no_grad():
        x = latents(
            model.net, model.objective, eps, condition, steps=how.steps, solver=how.solver,
            batch=batch_of(eps),
        )  # fmt: skip
    levels = null_distance(model, test.prompts[:MEASURED], seed=how.seed)
    return Side(levels, pictures(model.decode, x))


def joined(original: Side, converted: Side, test: Test) -> tuple[Null, tuple[Shot, ...]]:
    """Both models' sides as the report holds them."""
    seeds = test.seeds[:NOISES]
    captions = [kind for kind in KINDS for _ in seeds]
    found = shots(captions, (*seeds, *seeds), original.images, converted.images)
    return Null(original.levels, converted.levels), found
