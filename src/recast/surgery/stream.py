"""Files that are read, worked on and hashed at the same time, a piece after the other.

Reading, hashing, arithmetic and writing all leave Python to itself, so threads share the work:

    reading -> work -> writing        each some pieces ahead of the next
       \\-> hashing                    of every file that is read, by itself
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from typing import TypeVar

import torch
from torch import Tensor

from recast.checkpoint import Checkpoint
from recast.header import DTYPES
from recast.opened import OpenFile

T = TypeVar("T")
AHEAD = 2  # pieces that are ready before they are wanted, and that hashing may be behind
LARGEST = 1 << 22  # bytes of a piece: what several threads hold stays near the processor
UNKNOWN = "0" * 64  # stands for a hash until the file was read


def ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items, made in a thread of their own, AHEAD of them before they are wanted."""
    source, end = iter(items), object()
    with ThreadPoolExecutor(1) as pool:
        waiting = deque(pool.submit(next, source, end) for _ in range(AHEAD))
        while (found := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, source, end))
            yield found  # type: ignore[misc]
            del found  # or it stays until the next is here


def piece_size(largest: int, files: int) -> int:
    """Bytes of a piece, so that all that are held are no more than three times the largest tensor.

    Of each file AHEAD are ready, AHEAD wait for their hash, one is read and one worked on; of the
    result AHEAD are ready, one is made and one written.
    """
    held = files * (2 * AHEAD + 2) + AHEAD + 2
    return max(1 << 12, min(LARGEST, 3 * largest // held))


class Source:
    """A checkpoint that is read piece by piece, and hashed on the way where it is one file.

    Pieces may come in any order: what lies before one is read and hashed, what was hashed already
    is passed over, so that in the file's order nothing is read twice. Close it, or use with.
    """

    def __init__(self, file: Checkpoint) -> None:
        self.file = file
        self._pool = ThreadPoolExecutor(1)
        self._behind: deque[Future[None]] = deque()
        self._hash, self._at = hashlib.sha256(), 0

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def read(self, key: str, first: int, last: int) -> Tensor:
        """Values first to last of a tensor as it lies in the file, flat. Never write into them."""
        spec, single = self.file.specs[key], self.file.single
        if single is None or not spec.nbytes:
            return self.file[key].reshape(-1)[first:last]
        size = DTYPES[spec.dtype][0]
        at = single.start(key) + first * size
        data = single.read(at, (last - first) * size)
        self._behind.append(self._pool.submit(self._follow, single, at, data))
        if len(self._behind) > AHEAD:
            self._behind.popleft().result()
        return torch.frombuffer(data, dtype=spec.torch_dtype)

    def sha256(self) -> str:
        """Hash of the whole file, once all wanted pieces were read."""
        single = self.file.single
        if single is None:
            return self.file.sha256()
        while self._behind:
            self._behind.popleft().result()
        self._upto(single, single.nbytes)
        return self._hash.hexdigest()

    def _follow(self, single: OpenFile, at: int, data: bytearray) -> None:
        end = at + len(data)
        self._upto(single, at)
        if end > self._at:
            self._hash.update(memoryview(data)[self._at - at :])
            self._at = end

    def _upto(self, single: OpenFile, end: int) -> None:
        if end > self._at:
            single.add_to(self._hash, self._at, end)
            self._at = end


def spans(key: str, shape: tuple[int, ...], values: int) -> Iterator[tuple[str, int, int]]:
    """The pieces of a tensor, at most so many values each; an empty tensor has one."""
    whole = prod(shape)
    for first in range(0, max(whole, 1), values):
        yield key, first, min(first + values, whole)
