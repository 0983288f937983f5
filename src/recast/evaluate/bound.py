"""Pictures of conditions that are encoded already, when the text encoders have left the memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from recast.objective import Net, Objective
from recast.sample.images import sample_latents
from recast.text.encode import Condition, cat
from recast.timesteps import grid


def noises(shape: tuple[int, int, int], seeds: Sequence[int]) -> Tensor:
    """A noise (C, h, w) for each seed, the one that `sample_images` begins with."""
    made = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(made)


@torch.no_grad()
def latents(
    net: Callable[[Condition], Net],
    objective: Objective,
    eps: Tensor,
    condition: Condition,
    negative: Condition | None = None,
    *,
    steps: int,
    scale: float = 1.0,
    solver: str = "euler",
    batch: int = 8,
) -> Tensor:
    """Sample latents (B, C, h, w) from noises, guided against `negative` where it is given.

    Both conditions have B rows; the net answers in `objective`.
    """
    times = grid(objective.path, steps)
    found = []
    for first in range(0, len(eps), batch):
        rows = slice(first, first + batch)
        asked = condition[rows] if negative is None else cat([condition[rows], negative[rows]])
        generators = [torch.Generator().manual_seed(k) for k in range(first, first + batch)]
        x = eps[rows]
        for step in sample_latents(
            net(asked), objective, x, times, scale=scale, solver=solver,
            paired=negative is not None, generator=generators[: len(x)],
        ):  # fmt: skip
            x = step.x
        found.append(x)
    return torch.cat(found)


def pictures(decode: Callable[[Tensor], Tensor], x: Tensor, *, at_once: int = 8) -> list[Tensor]:
    """Decode latents into pictures (3, H, W) in [-1, 1] on the CPU."""
    with torch.no_grad():
        parts = [decode(part).float().clamp(-1, 1).cpu() for part in x.split(at_once)]
    return list(torch.cat(parts))
