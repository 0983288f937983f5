"""The null condition: how far apart the two things are that samplers call "no prompt".

    distance(t) = |u(x, t | empty prompt) - u(x, t | zeros)| / |u(x, t | empty prompt)|

u = eps - x0 is what the answer implies on the linear path, whatever the network predicts, so that
models of different objectives can be compared. Norms are over all latents of a noise level. Zeros
are zero context and zero pooled text, with SDXL's sizes as they are. A model was trained with one
of the two; where they are far apart, guidance against the other one breaks it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recast.evaluate.bound import latents, noises
from recast.evaluate.values import NullLevel
from recast.model import Model
from recast.objective import FLOW, Net, express
from recast.text.encode import Condition
from recast.train import seeded

BINS = 10
STEPS = 10  # of the sampler that makes the latents
POSITIONS = 4096  # latent positions in one pass of the network


@dataclass(frozen=True)
class Nulls:
    """The two conditions without a prompt, one row each."""

    empty: Condition
    zero: Condition


def nulls(model: Model) -> Nulls:
    """Encode the empty prompt, and zero it."""
    with torch.no_grad():
        empty = model.condition([""])
    return Nulls(empty, empty.zeros())


def null_distance(
    model: Model, prompts: Sequence[str], *, bins: int = BINS, seed: int = 0
) -> tuple[NullLevel, ...]:
    """Measure an opened model on latents that it makes for `prompts`, and noises linearly."""
    with torch.no_grad():
        condition = model.condition(prompts)
    eps = noises(model.latent_shape(), [seed + k for k in range(len(prompts))]).to(model.device)
    size = max(1, POSITIONS // eps[0, 0].numel())
    x0 = latents(model.net, model.objective, eps, condition, steps=STEPS, batch=size)
    both = nulls(model)
    return tuple(
        levels(lambda c: express(model.net(c), model.objective, FLOW), x0, both, bins, seed)
    )


@torch.no_grad()
def levels(
    bound: Callable[[Condition], Net], x0: Tensor, both: Nulls, bins: int, seed: int
) -> Iterator[NullLevel]:
    """The distance in each of `bins` even parts of the path; the net answers in FLOW."""
    at = seeded(seed, "null")
    size = max(1, POSITIONS // x0[0, 0].numel())
    for k in range(bins):
        eps = torch.randn(x0.shape, generator=at).to(x0)
        t = ((k + torch.rand(len(x0), generator=at)) / bins).clamp(max=1 - 1e-6).to(x0)
        x = FLOW.noise(x0, eps, t)
        apart = whole = 0.0
        for rows in torch.arange(len(x0)).split(size):
            one = bound(both.empty)(x[rows], t[rows]).double()
            other = bound(both.zero)(x[rows], t[rows]).double()
            apart += (one - other).square().sum().item()
            whole += one.square().sum().item()
        yield NullLevel(k / bins, (k + 1) / bins, (apart / whole) ** 0.5 if whole else 0.0)
