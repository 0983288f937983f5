"""The next batch is read while this one is trained on, by one thread."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

Read = TypeVar("Read")


class Ahead(Generic[Read]):
    """Results by number, the following one begun when one is asked for.

    Which one follows is guessed from the distance of the last two; a wrong guess costs its work
    and nothing else, since `read` is a pure function. What it raises is raised where it is asked
    for.
    """

    def __init__(self, read: Callable[[int], Read]) -> None:
        self.read = read
        self.pool = ThreadPoolExecutor(1, "batches")
        self.last: int | None = None
        self.guess: tuple[int, Future[Read]] | None = None

    def __call__(self, number: int) -> Read:
        """Return `read(number)`."""
        if self.guess is not None and self.guess[0] == number:
            found = self.guess[1].result()
        else:
            found = self.read(number)
        distance = 1 if self.last is None else number - self.last
        self.last = number
        following = number + max(1, distance)
        self.guess = following, self.pool.submit(self.read, following)
        return found

    def __enter__(self) -> Ahead[Read]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)
