"""The generalised Cantor function: a distribution on [0, 1] whose middle third holds mass alpha.

    w0 = (1 - alpha) / 2        F(x) = w0 F(3x)                     on the first third
                                     = w0 + alpha F(3x - 1)         on the second
                                     = w0 + alpha + w0 F(3x - 2)    on the last

cut off at a depth, below which F is the identity. alpha = 0 is the Cantor function, alpha = 1/3 the
identity. Rising and continuous in x, smooth in alpha; F(0) = 0, F(1) = 1, F(x) + F(1 - x) = 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

DEPTH = 12
SHALLOW = 4  # to learn through: the slope in x grows with the depth
LOW, HIGH = 0.05, 0.8  # of alpha while it is learned


def staircase(x: Tensor, alpha: Tensor, depth: int = DEPTH) -> Tensor:
    """F_alpha(x) for x in [0, 1], of x's shape; alpha in [0, 1] broadcasts against x."""
    side = (1 - alpha) / 2
    mass, sum_ = torch.ones_like(x + alpha), torch.zeros_like(x + alpha)
    for _ in range(depth):
        third = (3 * x.detach()).floor().clamp(0, 2)
        middle, last = third == 1, third == 2
        before = torch.where(middle, side, torch.where(last, side + alpha, 0))
        sum_ = sum_ + mass * before
        mass = mass * torch.where(middle, alpha, side)
        x = 3 * x - third
    return sum_ + mass * x
