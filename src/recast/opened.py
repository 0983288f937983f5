"""One open safetensors file: its header, checked, and its bytes, read at positions.

Reading is pread into fresh memory, never a mapping: streaming a 6.9 GB file adds the size of its
largest tensor to memory, and a file that another process truncates is an error, not a crash.
"""

from __future__ import annotations

import hashlib
import os
import weakref
from pathlib import Path
from typing import Protocol

from recast.disk import FLAGS, read_at
from recast.errors import Refused
from recast.header import HEADER_LIMIT, Header, Spec, parse_header, refuse_kind

CHUNK = 1 << 24
PIECE = 1 << 22  # of hashing: read and hashed while it is in the processor's cache


class Digest(Protocol):
    """What hashlib's objects do."""

    def update(self, data: memoryview, /) -> None: ...
    def hexdigest(self) -> str: ...


class OpenFile:
    """A safetensors file that stays open, so that one replaced meanwhile is not mixed with it.

    Opening reads and checks only the header and raises Refused for whatever is not a sound file.
    """

    def __init__(self, path: Path, header_limit: int = HEADER_LIMIT) -> None:
        self.path = path
        self.files = (path,)
        self._fd = _open(path)
        self._close = weakref.finalize(self, os.close, self._fd)
        try:
            header = _read_header(path, self._fd, header_limit)
        except BaseException:
            self.close()
            raise
        self.specs: dict[str, Spec] = header.specs
        self.metadata: dict[str, str] = header.metadata
        self._data = header.data

    @property
    def nbytes(self) -> int:
        return os.fstat(self._fd).st_size

    def close(self) -> None:
        self._close()

    def raw(self, key: str) -> bytearray:
        spec = self.specs[key]
        return self.read(self._data + spec.start, spec.nbytes)

    def start(self, key: str) -> int:
        """Where a tensor begins in the file."""
        return self._data + self.specs[key].start

    def read(self, at: int, count: int) -> bytearray:
        """Bytes of the file, all of them."""
        data = bytearray(count)
        _read_into(self.path, self._fd, memoryview(data), at)
        return data

    def sha256(self) -> str:
        found = hashlib.sha256()
        self.add_to(found, 0, self.nbytes)
        return found.hexdigest()

    def add_to(self, digest: Digest, start: int, end: int) -> None:
        """Let a hash have the bytes from start to end."""
        held = memoryview(bytearray(min(PIECE, max(0, end - start))))
        for at in range(start, end, PIECE):
            part = held[: end - at]
            _read_into(self.path, self._fd, part, at)
            digest.update(part)


def _open(path: Path) -> int:
    if path.is_dir():
        if (path / "model_index.json").exists() or (path / "unet").is_dir():
            raise Refused(
                f"{path} is a diffusers folder, and a single file is wanted here: write one with "
                "recast export FOLDER --to single-file."
            )
        raise Refused(f"{path} is a folder: give a .safetensors file.")
    try:
        return os.open(path, os.O_RDONLY | FLAGS | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError as error:
        raise Refused(f"{path} does not exist: check the path.") from error
    except (OSError, ValueError) as error:
        raise Refused(f"{path} cannot be read ({error}): check name and permissions.") from error


def _read_header(path: Path, fd: int, limit: int) -> Header:
    size = os.fstat(fd).st_size
    first = read_at(fd, 256, 0)
    if not first:
        raise Refused(f"{path} is empty: download or copy it again.")
    length = int.from_bytes(first[:8], "little")
    if len(first) < 10 or length > size - 8 or length > limit or first[8:9] != b"{":
        refuse_kind(path, first)
        if first[8:9] == b"{" and limit < length <= size - 8:
            raise Refused(
                f"{path} has a header of {length:,} bytes, more than the {limit:,} of "
                "any checkpoint: it is damaged or made to exhaust memory."
            )
        if first[8:9] == b"{" and length < 1 << 32:
            raise Refused(
                f"{path} is truncated (its header alone has {length:,} bytes, the file "
                f"{size:,}): download or copy it again."
            )
        raise Refused(
            f"{path} is no safetensors file (it begins with {first[:8]!r}): give a "
            ".safetensors checkpoint."
        )
    text = bytearray(length)
    _read_into(path, fd, memoryview(text), 8)
    return parse_header(path, bytes(text), size - 8 - length)


def _read_part(fd: int, view: memoryview, at: int) -> int:
    """Read into memory at a position; Windows has no preadv."""
    if hasattr(os, "preadv"):
        return os.preadv(fd, [view], at)
    data = read_at(fd, len(view), at)
    view[: len(data)] = data
    return len(data)


def _read_into(path: Path, fd: int, view: memoryview, at: int) -> None:
    done = 0
    while done < len(view):
        try:
            count = _read_part(fd, view[done : done + CHUNK], at + done)
        except OSError as error:
            raise Refused(
                f"{path} cannot be read at byte {at + done:,} ({error.strerror}): check "
                "the disk, or copy the file elsewhere."
            ) from error
        if not count:
            raise Refused(
                f"{path} became shorter while it was read: run again once nothing else writes it."
            )
        done += count
