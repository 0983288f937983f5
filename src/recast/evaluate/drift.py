"""Drift per noise level: how far a network's answers are from the original's, and from the data.

    against_original  mean |net(x, t) - teacher(x, t)|²      what the conversion changed
    converted         mean |net(x, t) - target|²             the loss it would report
    original          mean |teacher(x, t) - target|²         the same for the original: the floor

All three in the target objective's own output, on fixed latents, fixed noise and fixed times, one
time per latent and noise level. Above the range of the original's path it has no answer of its own,
so the means weight every level by the share of it that the original covers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from recast.errors import CheckFailed
from recast.evaluate.values import Drift, Level
from recast.objective import Net, Objective

Bound = Callable[[Any], Net]
"""A condition -> the network bound to it."""


def drift(
    net: Bound,
    teacher: Bound,
    objective: Objective,
    latents: Sequence[Tensor],
    conditions: Sequence[Any],
    *,
    source: Objective | None = None,
    bins: int = 10,
    seed: int = 0,
) -> Drift:
    """Measure `net` against `teacher`, both answering in `objective`.

    `latents` are batches (B, C, H, W) and `conditions` what each batch is bound to. `teacher` is
    the original `express`ed in `objective`; `source` is its own objective and decides `covered`.
    Raises CheckFailed when a network answers with something that is not a number.
    """
    generator = torch.Generator().manual_seed(seed)
    draws = [
        (torch.randn(x0.shape, generator=generator), torch.rand(bins, len(x0), generator=generator))
        for x0 in latents
    ]
    levels = []
    for k in range(bins):
        rows = []
        for x0, condition, (eps, part) in zip(latents, conditions, draws, strict=True):
            t = ((k + part[k]) / bins).clamp(max=1 - 1e-6).to(x0.device)
            rows.append(
                _errors(net(condition), teacher(condition), objective, x0, eps.to(x0), t, source)
            )
        means = torch.cat(rows).mean(0).tolist()
        levels.append(Level(k / bins, (k + 1) / bins, *means))
        if not all(map(_finite, means)):
            raise CheckFailed(
                f"between t = {k / bins} and {(k + 1) / bins} a network's answer is not a number"
            )
    return summarised(tuple(levels), objective.name)


def summarised(levels: tuple[Level, ...], objective: str) -> Drift:
    """Weight every level by what the original covers of it."""
    covered = sum(level.covered for level in levels)
    if not covered:
        return Drift(
            None, None, None, None, levels, objective, "no level lies in the original's range"
        )

    def mean(key: str) -> float:
        return sum(getattr(level, key) * level.covered for level in levels) / covered

    original, converted = mean("original"), mean("converted")
    ratio = converted / original if original else None
    return Drift(original, converted, ratio, mean("against_original"), levels, objective)


@torch.no_grad()
def _errors(
    net: Net,
    teacher: Net,
    objective: Objective,
    x0: Tensor,
    eps: Tensor,
    t: Tensor,
    source: Objective | None,
) -> Tensor:
    """Return (B, 4): the squared errors in Level's order, and whether the original covers t."""
    x, target = objective.noise(x0, eps, t), objective.target(x0, eps, t)
    # The teacher may be the same module with other weights, so one answers after the other.
    theirs = teacher(x, t).float()
    ours = net(x, t).float()
    errors = [
        (a - b).square().flatten(1).mean(1)
        for a, b in ((ours, theirs), (ours, target), (theirs, target))
    ]
    covered = torch.ones_like(t) if source is None else source.path.covers(*objective.path(t)).to(t)
    return torch.stack([*errors, covered], 1).double().cpu()


def _finite(value: float) -> bool:
    return value - value == 0
