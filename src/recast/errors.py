"""What can go wrong, each with the exit code it ends the command with.

A message is one sentence: what happened, where, and how to mend it.
"""

from __future__ import annotations


class RecastError(Exception):
    """Anything Recast stops for on purpose."""

    code = 1


class CheckFailed(RecastError):
    """A check that was asked for did not pass."""

    code = 1


class Refused(RecastError):
    """Bad input or usage; nothing has been written."""

    code = 2


class Diverged(RecastError):
    """Training produced numbers that are not finite; the last good state is kept."""

    code = 4


class NotFinite(Diverged):
    """Steps or weights stopped being finite; the state last saved is the one to go back to."""


class Stopped(RecastError):
    """The user's signal ended a run; what is done is saved, and the same command goes on there."""

    def __init__(self, signal: int, text: str) -> None:
        super().__init__(text)
        self.code = 128 + signal


class NoRoom(RecastError):
    """The disk or a device's memory is too small; what existed before still does."""

    code = 5
