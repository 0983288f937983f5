"""Frozen matrices that read one input, with the changes of their factors, as one step of autograd.

    y_j = W_j x + b_j + sum_i B_ji A_ji x                   j: query, key, value (see fused)

    dx = sum_j W_j^T dy_j + A^T B^T dy         A: all A_ji one below the other, B^T dy likewise

The factors' products with x, going there and back, are one product with A. dx is added up in
place. Answers can be had split into the heads of attention, and x be given so: what lies between
a layer and its attention needs no steps of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from recast.adapter.fused import Pairs, as_dtype, narrow, once, outer, pairs_of, run, sum_of, wide

if TYPE_CHECKING:
    from recast.adapter.layers import LoCon


@dataclass(frozen=True)
class Form:
    """The layers, the heads that their answers are split into, and those that x comes in."""

    layers: Sequence[LoCon]
    heads: int = 0
    joins: int = 0


def several(x: Tensor, layers: Sequence[LoCon], heads: int = 0) -> Any:
    """One answer a layer, (N, T, O), or with heads (N, heads, T, O / heads); alone if it is one.

    x: (N, T, I) or, in heads, (N, heads, T, I / heads). The layers are linear, of one shape, and
    have all a start or none.
    """
    form = Form(layers, heads, x.shape[1] if x.ndim == 4 else 0)
    return run(Several, x, form, *(f for layer in layers for f in (layer.up, layer.down)))


class Several(torch.autograd.Function):
    """Weights and biases are taken as frozen: gradients are those of x, B and A."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, form: Form, *masters: Tensor) -> Any:
        x = x.transpose(1, 2).flatten(2) if form.joins else x
        fixed: list[Any] = []
        for layer in form.layers:
            fixed += [layer.base.weight, layer.up0, layer.down0]
        changes = _changes(masters, fixed, form, x.dtype)
        summed = fixed[0].dtype == torch.float32 and wide(x, fixed[0], None)
        outs, hidden = [], None
        for layer, weight, pairs in zip(form.layers, fixed[::3], changes, strict=True):
            outs.append(F.linear(x, sum_of(weight, pairs) if summed else weight, layer.base.bias))
        for turn, downs in enumerate(() if summed else _joint(changes)):
            inner = x.reshape(-1, x.shape[-1]) @ downs.T
            hidden = inner if turn == 0 else hidden
            parts = inner.split([pairs[turn][0].shape[1] for pairs in changes], 1)
            for out, part, pairs in zip(outs, parts, changes, strict=True):
                out.view(-1, out.shape[-1]).addmm_(part, pairs[turn][0].T)
        ctx.form = form
        ctx.save_for_backward(x, hidden, *masters, *fixed)
        if form.heads:
            shape = (*x.shape[:2], form.heads, -1)
            outs = [out.view(shape).transpose(1, 2) for out in outs]
        return outs[0] if len(outs) == 1 else tuple(outs)

    @staticmethod
    @once
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, *saved = ctx.saved_tensors
        form, flat, count = ctx.form, x.reshape(-1, x.shape[-1]), 2 * len(ctx.form.layers)
        masters, fixed = saved[:count], saved[count:]
        changes, summed = _changes(masters, fixed, form, x.dtype), hidden is None
        each = [(dy.transpose(1, 2) if form.heads else dy).reshape(len(flat), -1) for dy in dys]
        dx = None
        if ctx.needs_input_grad[0]:
            for dy, weight, pairs in zip(each, fixed[::3], changes, strict=True):
                weight = sum_of(weight, pairs) if summed else weight
                dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
        if summed:  # the start is in the sum; masters are what is left
            changes = _changes(masters, [None] * len(fixed), form, x.dtype)
        if summed and narrow(fixed[0], len(masters[1])):
            one = [pairs[0] for pairs in changes]
            found: Iterator[tuple[Tensor, Tensor]] = map(_whole, each, repeat(flat), one)
        else:
            found = _factors(each, flat, hidden, changes, None if summed else dx)
        grads: list[Tensor | None] = [None if dx is None else _as_given(dx, x, form), None]
        for (db, da), layer in zip(found, form.layers, strict=True):
            db = as_dtype(db, masters[0].dtype)
            grads += [db if layer.scale == 1 else db * layer.scale, as_dtype(da, masters[0].dtype)]
        return tuple(grads)


def _changes(
    masters: Sequence[Tensor], fixed: Sequence[Any], form: Form, dtype: torch.dtype
) -> list[Pairs]:
    """The products that make each layer's change; fixed: weight, up0 and down0 of every layer."""
    found = []
    for i, layer in enumerate(form.layers):
        (up, down), (up0, down0) = masters[2 * i : 2 * i + 2], fixed[3 * i + 1 : 3 * i + 3]
        found.append(pairs_of(up, down, up0, down0, layer.scale, dtype))
    return found


def _joint(changes: list[Pairs]) -> Iterator[Tensor]:
    """All layers' first A one below the other, then their second."""
    for turn in zip(*changes, strict=True):
        downs = [a for _, a in turn]
        yield downs[0] if len(downs) == 1 else torch.cat(downs)


def _factors(
    dys: list[Tensor], x: Tensor, hidden: Tensor | None, changes: list[Pairs], dx: Tensor | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """(dB, dA) of each layer; adds to dx, where it is given, what goes back through the factors."""
    total: Any = None
    for turn, downs in enumerate(_joint(changes)):
        inner = [dy @ pairs[turn][0] for dy, pairs in zip(dys, changes, strict=True)]
        back = inner[0] if len(inner) == 1 else torch.cat(inner, 1)
        if dx is not None:
            dx.addmm_(back, downs)
        total = back if total is None else total.add_(back)
        hidden = x @ downs.T if hidden is None else hidden
    assert hidden is not None
    ranks = [pairs[0][0].shape[1] for pairs in changes]
    das, parts = (total.T @ x).split(ranks), hidden.split(ranks, 1)
    for dy, part, da in zip(dys, parts, das, strict=True):
        yield outer(dy, part), da


def _whole(dy: Tensor, x: Tensor, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The same by the gradient of the weight."""
    (b, a), whole = pair, dy.T @ x
    return whole @ a.T, b.T @ whole


def _as_given(dx: Tensor, x: Tensor, form: Form) -> Tensor:
    """The gradient of x in its heads, if that is how it came."""
    dx = dx.view(x.shape)
    return dx.unflatten(2, (form.joins, -1)).transpose(1, 2) if form.joins else dx
