"""The recipe's loss: which distance, which weights."""

from __future__ import annotations

from functools import partial

from recast.objective import Objective
from recast.recipe import Recipe
from recast.timesteps import piecewise
from recast.train import DISTANCES, HUBERS, Criterion, Distance, Learned, Target, criterion
from recast.train.loss import fft
from recast.weighting import WEIGHTINGS, Weighting


def loss_of(
    recipe: Recipe, target: Target, objective: Objective, learned: Learned | None = None
) -> Criterion:
    """The criterion that the recipe describes."""
    curve = recipe.train.curve
    return criterion(
        target,
        objective,
        distance_of(recipe),
        weighting_of(recipe),
        curve=None if curve == 1 else piecewise(curve),
        learned=learned,
    )


def distance_of(recipe: Recipe) -> Distance:
    """The recipe's distance with its arguments."""
    how = recipe.train
    if how.distance == "huber":
        return HUBERS[how.huber_schedule](how.huber_c)
    if how.distance == "fft":
        measure = partial(fft, phase=how.fft_phase, bands=how.fft_bands)
        return Distance(measure, of_x0=DISTANCES["fft"].of_x0)
    return DISTANCES[how.distance]


def weighting_of(recipe: Recipe) -> Weighting | None:
    """The recipe's fixed weighting with its arguments; None where there is none."""
    how = recipe.train
    if how.weighting in ("uniform", "edm2"):
        return None
    options: dict[str, dict[str, float]] = {
        "min-snr": {"gamma": how.gamma},
        "soft-min-snr": {"gamma": how.gamma},
        "p2": {"k": how.p2_k, "gamma": how.p2_gamma},
    }
    return WEIGHTINGS[how.weighting](**options.get(how.weighting, {}))
