"""Noise that is not plain: coarser waves, shifted means, pairs that lie near, perturbed inputs.

Each is a pure function of its arguments; whoever calls gives every batch its own generator. All
but `perturbed` change the eps that the target is made of, too.
"""

from dataclasses import replace

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from recast.objective import Objective, levels
from recast.train.assign import assign
from recast.train.draws import Draw


def multires(eps: Tensor, count: int, discount: float, generator: Generator) -> Tensor:
    """Add `count` layers of ever coarser noise, then bring every sample to a deviation of 1.

    Layer i has sides divided by r^i, r ~ U(2, 4), and counts discount^i; layers end at one
    position. (Whitaker 2023, multi-resolution noise. The deviation is the sample's own, so that it
    does not depend on what else is in the batch.)
    """
    total = eps.clone()
    height, width = eps.shape[-2:]
    for i in range(count):
        r = 2 + 2 * torch.rand((), generator=generator).item()
        size = max(1, int(height / r**i)), max(1, int(width / r**i))
        coarse = torch.randn(*eps.shape[:2], *size, generator=generator).to(eps)
        total += F.interpolate(coarse, eps.shape[-2:], mode="bilinear") * discount**i
        if 1 in size:
            break
    return total / total.flatten(1).std(1).view(-1, 1, 1, 1)


def offset(eps: Tensor, amount: float, generator: Generator) -> Tensor:
    """Shift every channel of every sample by `amount` times a normal number."""
    return eps + amount * torch.randn(*eps.shape[:2], 1, 1, generator=generator).to(eps)


def paired(eps: Tensor, x0: Tensor) -> Tensor:
    """Deal the noises of a batch out so that all are as near to their data as they can be.

    The linear assignment of least sum of squared distances: optimal transport within the batch.
    At batch 1 there is nothing to choose.
    """
    if len(eps) == 1:
        return eps
    # |x0 - eps|² differs from -2 x0 eps by terms that no assignment changes
    cost = -(x0.double().flatten(1) @ eps.double().flatten(1).T)
    return eps[assign(cost.cpu().numpy())]


def perturbed(objective: Objective, draw: Draw, amount: float, generator: Generator) -> Draw:
    """The draw with `amount` more noise in x than the target knows of (Ning et al. 2023)."""
    _, sigma = levels(objective.path, draw.t, draw.x)
    added = amount * sigma * torch.randn(draw.x.shape, generator=generator).to(draw.x)
    return replace(draw, x=draw.x + added, added=added)
