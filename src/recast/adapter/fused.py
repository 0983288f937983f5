"""A frozen layer and the change of its factors as one step of autograd.

    y = W x + b + sum_i B_i A_i x          [(B - B0, A), (B0, A - A0)], or [(s B, A)] from zero

    dA = (sum_i B_i)^T dy x^T     dB = s dy (A x)^T     dx = W^T dy + sum_i A_i^T B_i^T dy

The same numbers as PEFT's and LyCORIS' layers, with less to do and to keep: the change is added in
place, nothing is kept but x and A x, and the second half of a principal factor's change, which has
no masters of its own, takes no part in dA and dB.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


@dataclass(frozen=True)
class Geometry:
    """How a convolution walks; None stands for a matrix."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    def backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool]
    ) -> tuple[Tensor, Tensor]:
        """Gradients of x and of a weight, None where not wanted."""
        found = torch.ops.aten.convolution_backward(
            dy, x, weight, None, self.stride, self.padding, self.dilation, False, [0, 0], 1,
            [*wanted, False],
        )  # fmt: skip
        return found[0], found[1]


def fusable(layer: nn.Module, x: Tensor) -> bool:
    """Whether a layer is a plain one: nothing listens to it, and no autocast chooses its dtype."""
    if layer._forward_hooks or layer._forward_pre_hooks or torch.is_autocast_enabled(x.device.type):
        return False
    if type(layer) is nn.Conv2d:
        return layer.groups == 1 and layer.padding_mode == "zeros" and layer.padding != "same"
    return type(layer) is nn.Linear and x.dtype == layer.weight.dtype


def fused(
    layer: nn.Linear | nn.Conv2d,
    x: Tensor,
    up: Tensor,
    down: Tensor,
    start: tuple[Tensor, Tensor] | None,
    scale: float,
) -> Tensor:
    """The layer's answer with the change of its factors; `start` are B0 and A0, None for zero."""
    geometry = None
    if isinstance(layer, nn.Conv2d):
        assert not isinstance(layer.padding, str)
        geometry = Geometry(layer.stride, layer.padding, layer.dilation)
    up0, down0 = start or (None, None)
    return Fused.apply(x, layer.weight, layer.bias, up, down, up0, down0, scale, geometry)


class Fused(torch.autograd.Function):
    """Weight and bias are taken as frozen: gradients are those of x, B and A."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        up: Tensor,
        down: Tensor,
        up0: Tensor | None,
        down0: Tensor | None,
        scale: float,
        geometry: Geometry | None,
    ) -> Tensor:
        ctx.scale, ctx.geometry = scale, geometry
        hidden = []
        if geometry is None:
            out = F.linear(x, weight, bias)
        else:
            out = F.conv2d(x, weight, bias, *_walk(geometry))
        for b, a in _pairs(up, down, up0, down0, scale, x.dtype):
            hidden.append(_through(x, a, geometry))
            _add(out, hidden[-1], b)
        ctx.save_for_backward(x, weight, up, down, up0, down0, hidden[0])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, up, down, up0, down0, hidden = ctx.saved_tensors
        wants, pairs = ctx.needs_input_grad[0], _pairs(up, down, up0, down0, ctx.scale, x.dtype)
        if ctx.geometry is None:
            dx, db, da = _linear(dy, x, weight, pairs, hidden, wants)
        else:
            dx, db, da = _conv(dy, x, weight, pairs, hidden, wants, ctx.geometry)
        db = db.to(up.dtype)
        return (
            dx,
            None,
            None,
            db if ctx.scale == 1 else db * ctx.scale,
            da.to(down.dtype),
            *[None] * 4,
        )


Pairs = list[tuple[Tensor, Tensor]]


def _pairs(
    up: Tensor,
    down: Tensor,
    up0: Tensor | None,
    down0: Tensor | None,
    scale: float,
    dtype: torch.dtype,
) -> Pairs:
    """The products (B_i, A_i) that make the change; differences are taken before rounding."""
    if up0 is None or down0 is None:
        return [((up if scale == 1 else up * scale).to(dtype), down.to(dtype))]
    return [
        ((up - up0).to(dtype), down.to(dtype)),
        (up0.to(dtype), (down - down0).to(dtype)),
    ]


def _walk(geometry: Geometry) -> tuple[Any, ...]:
    return geometry.stride, geometry.padding, geometry.dilation


def _through(x: Tensor, a: Tensor, geometry: Geometry | None) -> Tensor:
    """A x: (n, r), or (B, r, h, w) of a convolution."""
    if geometry is None:
        return x.reshape(-1, x.shape[-1]) @ a.T
    return F.conv2d(x, a, None, *_walk(geometry))


def _add(out: Tensor, hidden: Tensor, b: Tensor) -> None:
    """Add B h to a layer's answer, in place."""
    if hidden.ndim == 2:
        out.view(-1, out.shape[-1]).addmm_(hidden, b.T)
    elif out.is_contiguous():
        out.flatten(2).baddbmm_(b.expand(len(out), -1, -1), hidden.flatten(2))
    else:
        out.add_(F.conv2d(hidden, b[:, :, None, None]))


def _linear(
    dy: Tensor, x: Tensor, weight: Tensor, pairs: Pairs, hidden: Tensor, wants: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """(dx, dB, dA) of a matrix."""
    shape, dy, x = x.shape, dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    inner = [dy @ b for b, _ in pairs]
    dx = dy @ weight if wants else None
    for g, (_, a) in zip(inner, pairs, strict=True) if dx is not None else ():
        dx.addmm_(g, a)
    total = inner[0] if len(inner) == 1 else inner[0].add_(inner[1])
    return None if dx is None else dx.view(shape), dy.T @ hidden, total.T @ x


def _conv(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    pairs: Pairs,
    hidden: Tensor,
    wants: bool,
    geometry: Geometry,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """(dx, dB, dA) of a convolution."""
    flat = dy.flatten(2)
    inner = [(b.T @ flat).view(len(dy), -1, *dy.shape[2:]) for b, _ in pairs]
    db = (flat @ hidden.flatten(2).transpose(1, 2)).sum(0)
    dx = geometry.backward(dy, x, weight, (True, False))[0] if wants else None
    if len(pairs) == 1:
        more, da = geometry.backward(inner[0], x, pairs[0][1], (wants, True))
        return None if dx is None else dx.add_(more), db, da
    for g, (_, a) in zip(inner, pairs, strict=True) if dx is not None else ():
        dx.add_(geometry.backward(g, x, a, (True, False))[0])
    total = inner[0].add_(inner[1])
    return dx, db, geometry.backward(total, x, pairs[0][1], (False, True))[1]
