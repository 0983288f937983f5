"""Several processes that compute one run, as `accelerate launch` or torchrun starts them.

    step = accumulate x count micro-batches; process r of w takes those numbered r, r + w, r + 2 w …

Gradients are gathered micro-batch by micro-batch and added up in the order of their numbers, so the
sum is bit for bit that of one process that accumulates them all; all processes then take the same
step. Process 0 alone writes, prints and holds the lock; the others wait until there is something to
train on. Whoever fails first says why, and all end.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from recast.errors import RecastError, Refused

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
LONG = timedelta(days=7)  # a first process that dreams or measures keeps the others waiting
POLL = 0.1  # seconds between looks at what has been reached
LINGER = 10.0  # seconds that the first process, which may host the store, waits for the others
BUCKET = 1 << 24  # numbers that are gathered together


class Left(RecastError):
    """Another process of this run has ended."""

    def __init__(self, code: int = 1) -> None:
        super().__init__(
            "another process of this run has ended: the same command goes on from its last state."
        )
        self.code = code


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def count() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local() -> int:
    """The number of this process on its machine: the GPU it takes."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def first() -> bool:
    """Whether this process writes, prints and holds the lock."""
    return rank() == 0


def several() -> bool:
    return count() > 1


def dealt(draws: Iterable[T]) -> Iterator[T]:
    """Of a run's micro-batches those that are this process's."""
    return islice(draws, rank(), None, count())


def join() -> None:
    """Meet the other processes, if there are any; once is enough.

    Raises Refused for ways of launching that share out weights, which Recast does not do.
    """
    if not several():
        return
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise Refused(
                f"{name} shares out weights, and Recast shares out batches only: launch with "
                "--multi_gpu instead."
            )
    import torch
    from torch import distributed

    if distributed.is_initialized():
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(local())
        backend = "cpu:gloo,cuda:nccl"
    distributed.init_process_group(backend, timeout=LONG)


def reached(name: str) -> None:
    """Let the others go on that wait for `name`."""
    if several():
        _store().set(name, "1")


def wait(names: Sequence[str], stopped: Callable[[], int]) -> str:
    """Wait until the first process has reached one of these points; returns which.

    A signal that only this process got is passed on. Raises Left when another one has failed.
    """
    told = False
    while True:
        try:
            for name in names:
                if _store().check([name]):
                    return name
            if _store().check(["code"]):
                raise Left(int(_store().get("code")))
            if not told and (signal := stopped()):
                _store().set("signal", str(signal))
                told = True
        except RuntimeError as error:  # the process that hosts the store is gone
            raise Left from error
        time.sleep(POLL)


def passed_on(stopped: Callable[[], int]) -> Callable[[], int]:
    """`stopped` that also knows the signal another process got while it waited."""
    if not several():
        return stopped
    since = 0.0

    def asked() -> int:
        nonlocal since
        if (signal := stopped()) or time.monotonic() - since < POLL:
            return signal
        since = time.monotonic()
        return int(_store().get("signal")) if _store().check(["signal"]) else 0

    return asked


def agree(*numbers: int) -> list[int]:
    """The largest of each number over all processes."""
    import torch

    both = torch.tensor(numbers)
    with _Talk():
        torch.distributed.all_reduce(both, torch.distributed.ReduceOp.MAX)
    return both.tolist()


def told(value: Any = None) -> Any:
    """The first process's value."""
    import torch

    held = [value]
    with _Talk():
        torch.distributed.broadcast_object_list(held, 0)
    return held[0]


def speaks(code: int) -> bool:
    """Whether this process, which ends with a code, is the one to say why: the first to end."""
    if not several():
        return True
    from torch import distributed

    if not distributed.is_initialized():
        return first()
    try:
        if _store().add("ended", 1) > 1:
            return False
        _store().set("code", str(code))
        return True
    except RuntimeError:
        return False


def linger() -> None:
    """Wait for the others to end, too: the store may be the first process's."""
    if not (several() and first()):
        return
    from torch import distributed

    if not distributed.is_initialized():
        return
    until = time.monotonic() + LINGER
    with suppress(RuntimeError):
        while _store().add("ended", 0) < count() and time.monotonic() < until:
            time.sleep(POLL)


@dataclass
class Team:
    """The processes as the training loop sees them; `sums` are the gradients added up so far."""

    count: int
    sums: dict[int, Tensor] = field(default_factory=dict)

    def take(self, parameters: Iterable[Tensor]) -> None:
        """Add every process's gradients to the sums, in the order of their micro-batches."""
        import torch

        for bucket in _buckets([p for p in parameters if p.requires_grad]):
            found = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
            flat = torch.cat([each.flatten() for each in found])
            places = [torch.empty_like(flat) for _ in range(self.count)]
            with _Talk():
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

    def woven(self, mine: list[Any]) -> list[Any]:
        """Everybody's values in the order of the micro-batches they belong to."""
        import torch

        all_: list[list[Any]] = [[] for _ in range(self.count)]
        with _Talk():
            torch.distributed.all_gather_object(all_, mine)
        return [value for round_ in zip(*all_, strict=True) for value in round_]


def team() -> Team | None:
    """The processes as the training loop needs them, None where there is one."""
    return Team(count()) if several() else None


class _Talk:
    """Inside, a connection that breaks means that another process has ended."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError):
            raise Left from error


def _store() -> Any:
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()


def _buckets(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
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
