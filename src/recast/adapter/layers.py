"""The layers that an attached adapter puts into a network: factors round a layer, or a delta in it.

    LoCon   student(x) = base(x) + (B - B0) A x + B0 (A - A0) x        teacher(x) = base(x)
    Delta   student    : weight + delta                                teacher    : weight

base is the original layer, or its weight in 8 or 4 bits (see recast.quantise).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recast.lowrank import LowRank
from recast.quantise import Quantised


@dataclass
class Switch:
    """Who answers; shared by all layers of one attachment."""

    student: bool = True


class LoCon(nn.Module):
    """A frozen linear or convolution layer plus the change of its low-rank factors.

    `up` (O, r) and `down` (r, I[, kh, kw]) are the masters; `up0` and `down0` the start.
    """

    base: nn.Linear | nn.Conv2d | Quantised
    up0: Tensor
    down0: Tensor

    def __init__(
        self,
        base: nn.Linear | nn.Conv2d | Quantised,
        value: LowRank,
        start: LowRank,
        switch: Switch,
        dropout: float,
    ) -> None:
        super().__init__()
        self.base = base
        self.switch = switch
        self.dropout = dropout  # works in training mode and only where gradients are wanted
        self.up, self.down = nn.Parameter(value.up.clone()), nn.Parameter(value.down.clone())
        self.register_buffer("up0", start.up, persistent=False)
        self.register_buffer("down0", start.down, persistent=False)

    @property
    def weight(self) -> Tensor:
        """The base layer's weight: callers look at its dtype and device."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        """Base output, and for the student the change on top."""
        out = self.base(x)
        if not self.switch.student:
            return out
        down = torch.cat([self.down, self.down - self.down0]).to(x.dtype)
        up = torch.cat([self.up - self.up0, self.up0], 1).to(x.dtype)
        x = F.dropout(x, self.dropout, self.training and torch.is_grad_enabled())
        hidden = _product(self.base, x, down)
        if down.ndim == 4:
            return out + F.conv2d(hidden, up[:, :, None, None])
        return out + F.linear(hidden, up)


def _product(layer: nn.Linear | nn.Conv2d | Quantised, x: Tensor, weight: Tensor) -> Tensor:
    """A layer's map with another weight and no bias."""
    if isinstance(layer, Quantised):
        return layer.product(x, weight)
    if isinstance(layer, nn.Conv2d):
        return layer._conv_forward(x, weight, None)
    return F.linear(x, weight)


class Delta(nn.Module):
    """Parametrization weight + delta, summed in fp32 and rounded once to the weight's dtype."""

    def __init__(self, value: Tensor, switch: Switch) -> None:
        super().__init__()
        self.switch = switch
        self.delta = nn.Parameter(value.clone())

    def forward(self, weight: Tensor) -> Tensor:
        """The parameter as the layer sees it."""
        return (weight + self.delta).to(weight.dtype) if self.switch.student else weight
