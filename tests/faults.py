"""A system that fails on purpose: the n-th call that touches the disk raises, or the process dies.

failing = Faults(3, errno.ENOSPC)
monkeypatch.setattr("recast.commit.os", failing); monkeypatch.setattr("recast.disk.os", failing)
"""

from __future__ import annotations

import os
from typing import Any

CALLS = frozenset({"open", "pwrite", "fsync", "replace", "rename", "fstat", "preadv", "close"})
DEAD = 77  # exit code of a process killed by `code=None`


class Faults:
    """Stands in for the module `os`; counts the calls in CALLS and fails at the n-th (from 1).

    code: the errno to raise, or None to leave the process at once, as kill -9 does. `only` limits
    which calls are counted. n = 0 never fails: `count` then says how many there are to fail.
    """

    def __init__(self, n: int, code: int | None, only: frozenset[str] = CALLS) -> None:
        self.n, self.code, self.only, self.count = n, code, only, 0

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in self.only:
            return real

        def call(*args: Any, **keywords: Any) -> Any:
            self.count += 1
            if self.count == self.n:
                if self.code is None:
                    os._exit(DEAD)
                if name == "close":
                    real(*args, **keywords)
                raise OSError(self.code, os.strerror(self.code))
            return real(*args, **keywords)

        return call
