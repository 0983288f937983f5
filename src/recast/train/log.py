"""The log of a run: whole lines of JSON, cut to what the state that a run goes on from had seen."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from recast.commit import FULL
from recast.errors import NoRoom


def open_log(path: Path, length: int = 0) -> IO[bytes]:
    """Open a log for appending, cut to the `length` its state recorded (and to whole lines)."""
    path.touch()
    with path.open("r+b") as log:
        kept = log.read(length)
        log.truncate(kept.rfind(b"\n") + 1)
    return path.open("ab")


def append(log: IO[bytes], record: Mapping[str, Any]) -> None:
    """Write one record as one whole line of JSON; numbers that are not finite become null.

    Raises NoRoom on a full disk; what is left of the line is cut off at the next opening.
    """
    try:
        log.write(json.dumps(_finite(record), allow_nan=False).encode() + b"\n")
        log.flush()
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise NoRoom(
            f"{log.name} could not be written, its disk is full: make room there, and the same "
            "command goes on."
        ) from error


def log_length(log: IO[bytes]) -> int:
    """The log's length in bytes, once they are on the disk; for `extra`, before saving."""
    log.flush()
    os.fsync(log.fileno())
    return log.tell()


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
