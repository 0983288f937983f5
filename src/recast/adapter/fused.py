"""A frozen layer and the change of its factors as one step of autograd.

    y = W x + b + sum_i B_i A_i x          [(B - B0, A), (B0, A - A0)], or [(s B, A)] from zero

    dA = (sum_i B_i)^T dy x^T     dB = s dy (A x)^T     dx = W^T dy + sum_i A_i^T B_i^T dy

Less to do and to keep than in a chain of layers. The second half of a principal factor's change
has no masters of its own and takes no part in dA and dB. In fp32, where there are more positions
than the weight is wide, the change is added to the weight, anew for the way back: nothing but x is
kept, and two of six narrow products fall away. Where the weight is hardly larger than its factors,
the other four do as well: with G = dy x^T, dA = (sum_i B_i)^T G and dB = s G A^T. In 16 bits small
changes would be lost in the sum: there they are added to the answer, in place, and x and A x are
kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

BROAD = 1024  # columns


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
        found = torch.ops.aten.convolution_backward.default(
            dy, x, weight, None, self.stride, self.padding, self.dilation, False, [0, 0], 1,
            [*wanted, False],
        )  # fmt: skip
        return found[0], found[1]


def fusable(layer: nn.Module, x: Tensor) -> TypeGuard[nn.Linear | nn.Conv2d]:
    """Whether a layer is a plain one: nothing listens to it, and no autocast chooses its dtype."""
    if layer._forward_hooks or layer._forward_pre_hooks or _cast(x):
        return False
    if type(layer) is nn.Conv2d:
        return layer.groups == 1 and layer.padding_mode == "zeros" and layer.padding != "same"
    return type(layer) is nn.Linear and x.dtype == layer.weight.dtype


def _cast(x: Tensor) -> bool:
    """Whether autocast chooses dtypes where x is."""
    if x.is_cpu:
        return torch.is_autocast_enabled("cpu")
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


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
    return run(Fused, x, layer.weight, layer.bias, up, down, up0, down0, scale, geometry)


def run(function: type[torch.autograd.Function], *args: Any) -> Any:
    """`function.apply`, without its search of every argument for what torch.func left in it."""
    if torch.compiler.is_compiling():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


def once(backward: Callable[..., Any]) -> Any:
    """torch's `once_differentiable`, which is at work only while a graph of gradients is kept."""
    guarded = once_differentiable(backward)

    @wraps(backward)
    def chosen(ctx: Any, *dys: Tensor) -> Any:
        return (guarded if torch.is_grad_enabled() else backward)(ctx, *dys)

    return chosen


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
        pairs = pairs_of(up, down, up0, down0, scale, x.dtype)
        summed = weight.dtype == torch.float32 and wide(x, weight, geometry)
        hidden = None
        out = _map(x, sum_of(weight, pairs) if summed else weight, bias, geometry)
        for b, a in () if summed else pairs:
            inner = _map(x, a, None, geometry)
            hidden = inner if hidden is None else hidden
            _add(out, inner, b, geometry)
        ctx.scale, ctx.geometry = scale, geometry
        ctx.save_for_backward(x, weight, up, down, up0, down0, hidden)
        return out

    @staticmethod
    @once
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, up, down, up0, down0, hidden = ctx.saved_tensors
        pairs = pairs_of(up, down, up0, down0, ctx.scale, x.dtype)
        wants, geometry, summed = ctx.needs_input_grad[0], ctx.geometry, hidden is None
        if summed:
            weight = sum_of(weight, pairs) if wants else weight
            pairs = [(up if ctx.scale == 1 else up * ctx.scale, down)]
        if summed and narrow(weight, len(down)):
            dx, db, da = _whole(dy, x, weight, pairs[0], wants, geometry)
        else:
            hidden = _map(x, down, None, geometry) if summed else hidden
            back = _linear if geometry is None else _conv
            dx, db, da = back(dy, x, weight, pairs, hidden, wants, summed, geometry)
        db = as_dtype(db, up.dtype)
        db = db if ctx.scale == 1 else db * ctx.scale
        return dx, None, None, db, as_dtype(da, down.dtype), None, None, None, None


Pairs = list[tuple[Tensor, Tensor]]


def pairs_of(
    up: Tensor,
    down: Tensor,
    up0: Tensor | None,
    down0: Tensor | None,
    scale: float,
    dtype: torch.dtype,
) -> Pairs:
    """The products (B_i, A_i) that make the change; differences are taken before rounding."""
    if up0 is None or down0 is None:
        return [(as_dtype(up if scale == 1 else up * scale, dtype), as_dtype(down, dtype))]
    return [
        (as_dtype(up - up0, dtype), as_dtype(down, dtype)),
        (as_dtype(up0, dtype), as_dtype(down - down0, dtype)),
    ]


def as_dtype(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The value in a dtype, without a call where it has that."""
    return value if value.dtype == dtype else value.to(dtype)


def wide(x: Tensor, weight: Tensor, geometry: Geometry | None) -> bool:
    """Whether summing the weight takes less than the two products it saves."""
    out, into = weight.shape[0], weight[0].numel()
    if geometry is None:
        positions = x.numel() // x.shape[-1]
    else:
        positions = len(x) * x.shape[2] * x.shape[3] // (geometry.stride[0] * geometry.stride[1])
    return positions * (into + out) > 2 * into * out


def narrow(weight: Tensor, rank: int) -> bool:
    """Whether G takes less than the four products it saves, which are slower in convolutions."""
    out, into = weight.shape[0], weight[0].numel()
    return (2 if weight.ndim == 2 else 4) * rank * (into + out) >= into * out


def sum_of(weight: Tensor, pairs: Pairs) -> Tensor:
    """The weight with the change."""
    total = weight.flatten(1)
    for b, a in pairs:
        total = torch.addmm(total, b, a.flatten(1))
    return total.view_as(weight)


def _map(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry | None) -> Tensor:
    """A layer's map with this weight."""
    if geometry is None:
        return F.linear(x, weight, bias)
    return F.conv2d(x, weight, bias, geometry.stride, geometry.padding, geometry.dilation)


def _add(out: Tensor, hidden: Tensor, b: Tensor, geometry: Geometry | None) -> None:
    """Add B h to a layer's answer, in place."""
    if geometry is None:
        _rows(out).addmm_(_rows(hidden), b.T)
    elif out.is_contiguous():
        out.flatten(2).baddbmm_(b.expand(len(out), -1, -1), hidden.flatten(2))
    else:
        out.add_(F.conv2d(hidden, b[:, :, None, None]))


def outer(dy: Tensor, hidden: Tensor) -> Tensor:
    """dy^T h, by h^T dy where a layer is so broad that this is up to twice as fast."""
    return (hidden.T @ dy).T if dy.shape[1] >= BROAD else dy.T @ hidden


def _rows(x: Tensor) -> Tensor:
    """(..., n) as (positions, n)."""
    return x.reshape(-1, x.shape[-1])


def _linear(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    pairs: Pairs,
    hidden: Tensor,
    wants: bool,
    summed: bool,
    _: None,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """(dx, dB, dA) of a matrix; a summed weight holds the change already."""
    flat = _rows(dy)
    inner = [flat @ b for b, _ in pairs]
    dx = None
    if wants:
        dx = flat @ weight
        for g, (_b, a) in zip(inner, pairs, strict=True) if not summed else ():
            dx.addmm_(g, a)
        dx = dx.view(x.shape)
    total = inner[0] if len(inner) == 1 else inner[0].add_(inner[1])
    return dx, outer(flat, _rows(hidden)), total.T @ _rows(x)


def _conv(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    pairs: Pairs,
    hidden: Tensor,
    wants: bool,
    summed: bool,
    geometry: Geometry,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """The same of a convolution."""
    flat = dy.flatten(2)
    inner = [(b.T @ flat).view(len(dy), -1, *dy.shape[2:]) for b, _ in pairs]
    db = (flat @ hidden.flatten(2).transpose(1, 2)).sum(0)
    dx = None
    if wants:
        dx = geometry.backward(dy, x, weight, (True, False))[0]
        for g, (_, a) in zip(inner, pairs, strict=True) if not summed else ():
            dx.add_(geometry.backward(g, x, a, (True, False))[0])
    total = inner[0] if len(inner) == 1 else inner[0].add_(inner[1])
    return dx, db, geometry.backward(total, x, pairs[0][1], (False, True))[1]


def _whole(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    pair: tuple[Tensor, Tensor],
    wants: bool,
    geometry: Geometry | None,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """The same by the gradient of the summed weight."""
    b, a = pair
    if geometry is None:
        flat = _rows(dy)
        dx = (flat @ weight).view(x.shape) if wants else None
        whole = flat.T @ _rows(x)
    else:
        dx, found = geometry.backward(dy, x, weight, (wants, True))
        whole = found.flatten(1)
    return dx, whole @ a.flatten(1).T, (b.T @ whole).view_as(a)
