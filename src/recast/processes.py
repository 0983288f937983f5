"""Several processes that compute one run, as `accelerate launch` or torchrun starts them.

    step = accumulate x count micro-batches; process r of w takes those numbered r, r + w, r + 2 w …

All processes take the same step, with everybody's gradients (recast.train.team). Process 0 alone
writes, prints and holds the lock; the others wait until there is something to train on. Whoever
fails first says why, and all end. Each tells every few seconds that it is still there: who stays
silent for minutes, or was the store's host and is gone, has ended without a word.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from recast.errors import RecastError, Refused

LONG = timedelta(days=7)  # a first process that dreams or measures keeps the others waiting
POLL = 0.1  # seconds between looks at what has been reached
LINGER = 10.0  # seconds that the first process, which may host the store, waits for the others
BEAT = 5.0  # seconds between signs of life
SILENCE = 180.0  # seconds without one after which a process counts as ended
GRACE = 10.0  # seconds in which a process may find that out by itself
OVER = "over"


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


def mine(number: int) -> bool:
    """Whether this process takes the micro-batch of a number."""
    return number % count() == rank()


def enough(found: int, what: str) -> None:
    """Refuse more processes than there is data."""
    if count() > found:
        raise Refused(
            f"{count()} processes and {found} {what}: launch with --num_processes "
            f"{max(1, found)} at most, or give more."
        )


def sharing() -> bool:
    """Whether the launch asks for weights to be shared out (FSDP)."""
    return several() and asked("FSDP")


def asked(name: str) -> bool:
    """Whether `accelerate launch` was told to use something."""
    return os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true"


def join() -> None:
    """Meet the other processes, if there are any; once is enough.

    Raises Refused for ways of launching that share out weights, which Recast does not do.
    """
    if not several():
        return
    for name in filter(asked, ("DEEPSPEED", "MEGATRON_LM")):
        raise Refused(
            f"{name} shares out weights in a way that Recast does not: launch with --multi_gpu, "
            "or with --use_fsdp to share them out."
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
    for work in (_beat, _listen):
        threading.Thread(target=work, daemon=True).start()


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
        with talk():
            return int(_store().get("signal")) if _store().check(["signal"]) else 0

    return asked


def agree(*numbers: int) -> list[int]:
    """The largest of each number over all processes."""
    import torch

    both = torch.tensor(numbers)
    with talk():
        torch.distributed.all_reduce(both, torch.distributed.ReduceOp.MAX)
    return both.tolist()


def told(value: Any = None) -> Any:
    """The first process's value."""
    import torch

    held = [value]
    with talk():
        torch.distributed.broadcast_object_list(held, 0)
    return held[0]


def speaks(code: int) -> bool:
    """Whether this process, which ends with a code, is the one to say why: the first to end.

    Where the store is gone its host has ended without a word, and whoever notices says so.
    """
    if not several():
        return True
    from torch import distributed

    if not distributed.is_initialized():
        return first()
    try:
        if _end() > 1:
            return False
        _store().set("code", str(code))
    except RuntimeError:
        pass
    return True


def leave() -> None:
    """End in order: the others are told, and may still ask the store."""
    if several():
        with suppress(RuntimeError, ValueError):  # the host is gone already, or nobody was met
            _end()
        linger()


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


@contextmanager
def talk() -> Iterator[None]:
    """Inside, a connection that breaks means that another process has ended."""
    try:
        yield
    except RuntimeError as error:
        raise Left from error


def broken(error: RuntimeError) -> bool:
    """Whether an error of torch says that a connection broke."""
    from torch import distributed

    return isinstance(error, distributed.DistError) or "gloo" in str(error).lower()


def _store() -> Any:
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()


def _end() -> int:
    """Note that this process ends in order; returns how many have."""
    _store().set(f"beat{rank()}", OVER)
    return int(_store().add("ended", 1))


def _beat() -> None:
    """Give signs of life until the end."""
    with suppress(RuntimeError):
        for number in range(10**9):
            if number and _store().get(f"beat{rank()}") == OVER.encode():
                return
            _store().set(f"beat{rank()}", str(number))
            time.sleep(BEAT)


def _listen() -> None:
    """End this process, wherever it waits, some time after another one has fallen silent."""
    heard: dict[int, tuple[bytes, float]] = {}
    while not _silent(heard):
        time.sleep(BEAT)
    time.sleep(GRACE)
    # torch may wait for days in a call that no exception reaches
    os.write(2, f"recast: {Left()}\n".encode())
    os._exit(Left().code)


def _silent(heard: dict[int, tuple[bytes, float]]) -> bool:
    """Whether some process has given no sign for too long; `heard` is what was found, and when."""
    now = time.monotonic()
    try:
        for other in set(range(count())) - {rank()}:
            name = f"beat{other}"
            found = _store().get(name) if _store().check([name]) else b""
            last, since = heard.setdefault(other, (found, now))
            if found != last:
                heard[other] = (found, now)
            elif found != OVER.encode() and now - since > SILENCE:
                return True
    except RuntimeError:  # the store is gone with its host
        return True
    return False
