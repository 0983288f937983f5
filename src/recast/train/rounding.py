"""Weights in bf16 that small steps do not get lost in: rounded up or down at random.

    P(up) = (value - below) / (above - below)        so that the mean is the value

Rounding to the nearest swallows every step below 1/512 of the weight, which is most of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

LOW = 1 << 16  # bf16 is the upper half of an fp32 number's bits
PIECE = 1 << 26  # numbers that are fp32 at a time


def rounded(value: Tensor) -> Tensor:
    """An fp32 tensor as bf16; the draw is torch's own generator's, which a state holds."""
    bits = value.view(torch.int32)
    up = (bits + torch.randint_like(bits, LOW)) & -LOW
    return torch.where(torch.isfinite(value), up.view(torch.float32), value).bfloat16()


def move(optimizer: Optimizer, together: bool = False) -> None:
    """Take a step with bf16 parameters widened to fp32 meanwhile, moments included.

    Piece by piece, since an fp32 copy of all is what is to be saved; `together` for optimizers that
    look at all parameters at once.
    """
    groups = optimizer.param_groups
    try:
        for group, piece in [(None, groups)] if together else _pieces(groups):
            optimizer.param_groups = piece
            with _widened(p for each in piece for p in each["params"]):
                optimizer.step()
            if group is not None:  # counters that an optimizer keeps in the group
                group |= {k: v for k, v in piece[0].items() if k != "params"}
    finally:
        optimizer.param_groups = groups


def _pieces(groups: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any] | None, list]]:
    """(group, parts of it as the optimizer's only group); the group for its last part alone."""
    for group in groups:
        parts: list[list[Tensor]] = [[]]
        for parameter in group["params"]:
            if parts[-1] and sum(p.numel() for p in parts[-1]) + parameter.numel() > PIECE:
                parts.append([])
            parts[-1].append(parameter)
        for number, part in enumerate(parts, 1):
            yield (group if number == len(parts) else None), [{**group, "params": part}]


@contextmanager
def _widened(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Inside, bf16 parameters and their gradients are fp32; after, rounded, without gradients."""
    narrow = [p for p in parameters if p.dtype == torch.bfloat16]
    for parameter in narrow:
        gradient, parameter.grad = parameter.grad, None
        parameter.data = parameter.data.float()
        parameter.grad = None if gradient is None else gradient.float()
    try:
        yield
    finally:
        for parameter in narrow:
            parameter.grad = None
            parameter.data = rounded(parameter.data)
