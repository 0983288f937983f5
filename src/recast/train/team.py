"""The processes of one run as the training loop sees them: gradients come together here.

    g = g_0 + g_1 + …       in the order of the micro-batches, so that the sum is one process's

Of weights that are shared out (see shards) torch adds up the gradients by itself, each process the
rows it holds, and only their norm is left to be put together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recast import processes

if TYPE_CHECKING:
    from recast.train.shards import Shards

BUCKET = 1 << 24  # numbers that are gathered together


@dataclass
class Team:
    """Several processes; `sums` are the gradients added up so far."""

    count: int
    shards: Shards | None = None
    sums: dict[int, Tensor] = field(default_factory=dict)

    def take(self, parameters: Iterable[Tensor]) -> None:
        """Add every process's gradients to the sums, in the order of their micro-batches."""
        whole = [p for p in parameters if p.requires_grad and not self.shares(p)]
        for bucket in buckets(whole):
            found = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
            flat = torch.cat([each.flatten() for each in found])
            places = [torch.empty_like(flat) for _ in range(self.count)]
            with processes.talk():
                torch.distributed.all_gather(places, flat)
            for place in places:
                pieces = place.split([p.numel() for p in bucket])
                for p, piece in zip(bucket, pieces, strict=True):
                    self._add(p, piece)
            for p in bucket:
                p.grad = None

    def _add(self, parameter: Tensor, piece: Tensor) -> None:
        if id(parameter) in self.sums:
            self.sums[id(parameter)].add_(piece.view_as(parameter))
        else:
            self.sums[id(parameter)] = piece.view_as(parameter).clone()

    def give(self, parameters: Iterable[Tensor]) -> None:
        """Put the sums where the optimizer looks for gradients."""
        for p in parameters:
            if id(p) in self.sums:
                p.grad = self.sums.pop(id(p))
            elif self.shards is not None and self.shares(p):
                self.shards.give(p)

    def shares(self, parameter: Tensor) -> bool:
        """Whether a parameter is this process's part of a larger one."""
        return self.shards is not None and id(parameter) in self.shards.owners

    def norm(self, parameters: Iterable[Tensor]) -> Tensor:
        """The norm of all gradients."""
        held = [p for p in parameters if p.grad is not None]
        if self.shards is None:
            return norm_of(held)
        square = norm_of([p for p in held if self.shares(p)]).square().to(held[0].device)
        with processes.talk():
            torch.distributed.all_reduce(square)
        return (square + norm_of([p for p in held if not self.shares(p)]).square()).sqrt()

    def woven(self, mine: list[Any]) -> list[Any]:
        """Everybody's values in the order of the micro-batches they belong to."""
        all_: list[list[Any]] = [[] for _ in range(self.count)]
        with processes.talk():
            torch.distributed.all_gather_object(all_, mine)
        return [value for round_ in zip(*all_, strict=True) for value in round_]


PLAIN = (Tensor, "cpu", torch.float32)


def norm_of(parameters: Iterable[Tensor]) -> Tensor:
    """The norm of the gradients there are."""
    grads = [p.grad for p in parameters if p.grad is not None]
    if grads and {(type(g), g.device.type, g.dtype) for g in grads} == {PLAIN}:
        # as below to the bit, in one call where torch makes one a tensor
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    return torch.nn.utils.get_total_norm(grads)


def team(shards: Shards | None = None) -> Team | None:
    """The processes as the training loop needs them, None where there is one."""
    return Team(processes.count(), shards) if processes.several() else None


def buckets(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters of one dtype together, in their order, so many numbers at a time."""
    for dtype in dict.fromkeys(p.dtype for p in parameters):
        bucket: list[Tensor] = []
        for p in parameters:
            if p.dtype != dtype:
                continue
            if bucket and sum(q.numel() for q in bucket) + p.numel() > BUCKET:
                yield bucket
                bucket = []
            bucket.append(p)
        if bucket:
            yield bucket
