"""Work on several tensors at once whose results come in order, in the memory of the largest."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


def in_order(
    jobs: Iterable[tuple[Callable[[], T], int]], *, threads: int, room: int
) -> Iterator[T]:
    """Results of jobs (what to call, size) in their order, computed ahead of who takes them.

    What is being worked on or waits for its turn has no more than `room` together, unless one alone
    has more. A job of size 0 is called when its turn comes, by who takes it. Each thread has one
    torch thread: small matrices keep the cores busier side by side than in parts, and the bits of a
    result do not depend on how many there are.
    """
    if threads < 2:
        for job, _ in jobs:
            yield job()
        return
    waiting: deque[tuple[Callable[[], T], int]] = deque()
    held, before = 0, torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        for job, size in jobs:
            while waiting and held + size > room:
                held -= waiting[0][1]
                yield waiting.popleft()[0]()
            waiting.append((pool.submit(job).result, size) if size else (job, 0))
            held += size
        while waiting:
            yield waiting.popleft()[0]()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)
