"""The layers that an attached adapter puts into a network: factors round a layer, or a delta in it.

    LoCon, from principal factors   student(x) = base(x) + (B - B0) A x + B0 (A - A0) x
    LoCon, from zero                student(x) = base(x) + s B A x          s = alpha / dim
    Delta                           student    : weight + delta
    all                             teacher(x) = base(x)

base is the original layer, or its weight in 8 or 4 bits (see recast.quantise).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recast.adapter.fused import fusable, fused
from recast.lowrank import LowRank
from recast.quantise import Quantised


@dataclass
class Switch:
    """Who answers; shared by all layers of one attachment."""

    student: bool = True


@dataclass(frozen=True)
class Dropouts:
    """Shares of a layer's change that are left out at random, in training and under gradients only.

    values: of the numbers that enter it (as PEFT has it). ranks: of its directions, by sample; what
    is left is scaled up (as kohya has it). modules: how often all of it, not scaled up (kohya and
    LyCORIS alike).
    """

    values: float = 0.0
    ranks: float = 0.0
    modules: float = 0.0

    def __bool__(self) -> bool:
        return self != NONE


NONE = Dropouts()


class LoCon(nn.Module):
    """A frozen linear or convolution layer plus the change of its low-rank factors.

    `up` (O, r) and `down` (r, I[, kh, kw]) are the masters; `up0` and `down0` the start, None where
    that is zero. The product counts `scale` times, which only a start from zero may have.
    """

    base: nn.Linear | nn.Conv2d | Quantised
    up0: Tensor | None
    down0: Tensor | None

    def __init__(
        self,
        base: nn.Linear | nn.Conv2d | Quantised,
        value: LowRank,
        start: LowRank | None,
        switch: Switch,
        dropouts: Dropouts = NONE,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.base = base
        self.switch = switch
        self.dropouts = dropouts or NONE
        self.scale = scale
        up = value.up.clone() if scale == 1 else value.up / scale
        self.up, self.down = nn.Parameter(up), nn.Parameter(value.down.clone())
        self.register_buffer("up0", start.up if start else None, persistent=False)
        self.register_buffer("down0", start.down if start else None, persistent=False)

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
        base, first = self.base, self.up0
        if not self.switch.student:
            return base(x)
        plain = self.dropouts is NONE or not (self.training and torch.is_grad_enabled())
        drops = NONE if plain else self.dropouts
        if not drops and fusable(base, x):
            start = None if first is None or self.down0 is None else (first, self.down0)
            return fused(base, x, self.up, self.down, start, self.scale)
        out = base(x)
        up, down = self.change()
        down = down.to(x.dtype)
        if drops.values:
            x = F.dropout(x, drops.values)
        hidden = _product(self.base, x, down)
        if drops.ranks or drops.modules:
            hidden = hidden * self.kept(hidden, drops)
        up = up.to(x.dtype)
        if down.ndim == 4:
            return out + F.conv2d(hidden, up[:, :, None, None])
        return out + F.linear(hidden, up)

    def change(self) -> tuple[Tensor, Tensor]:
        """Factors of what the student adds, in fp32: rank r from zero, 2 r from another start."""
        if self.up0 is None or self.down0 is None:
            return self.up if self.scale == 1 else self.up * self.scale, self.down
        up = torch.cat([self.up - self.up0, self.up0], 1)
        return up, torch.cat([self.down, self.down - self.down0])

    def kept(self, hidden: Tensor, drops: Dropouts) -> Tensor:
        """What each direction of (B, ..., k) or, of a convolution, (B, k, h, w) is multiplied with.

        Both halves of a principal factor's change are one direction.
        """
        axis = 1 if self.down.ndim == 4 else -1
        rank = len(self.down)
        drawn = torch.rand(len(hidden), rank, device=hidden.device)
        mask = (drawn >= drops.ranks).to(hidden.dtype) / (1 - drops.ranks)
        if drops.modules:
            mask = mask * (torch.rand((), device=hidden.device) >= drops.modules)
        mask = mask.repeat(1, hidden.shape[axis] // rank)
        shape = [len(hidden)] + [1] * (hidden.ndim - 1)
        shape[axis] = hidden.shape[axis]
        return mask.view(shape)


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
