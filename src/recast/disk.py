"""What commit needs of the system: a file that hashes what is written, and what systems differ in.

POSIX has pread, flock and folders that can be synced; Windows has none of them, renames no open
file and would end a process that is only asked whether it lives.
"""

from __future__ import annotations

import hashlib
import io
import os
import sys
from pathlib import Path
from typing import Any

if sys.platform == "win32":
    import msvcrt

    def hold(fd: int) -> None:
        """Take the file's lock; raises OSError if another process has it."""
        os.lseek(fd, 1 << 40, os.SEEK_SET)  # a byte beyond any content, which stays readable
        msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def hold(fd: int) -> None:
        """Take the file's lock; raises OSError if another process has it."""
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


CHUNK = 1 << 24
PIECE = 1 << 22  # of hashing
WINDOWS = sys.platform == "win32"
FLAGS = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)  # of every file that is opened


def read_at(fd: int, count: int, at: int) -> bytes:
    """Read at a position; Windows has no pread."""
    if hasattr(os, "pread"):
        return os.pread(fd, count, at)
    os.lseek(fd, at, os.SEEK_SET)
    return os.read(fd, count)


def write_at(fd: int, data: bytes | memoryview, at: int) -> int:
    """Write at a position; Windows has no pwrite."""
    if hasattr(os, "pwrite"):
        return os.pwrite(fd, data, at)
    os.lseek(fd, at, os.SEEK_SET)
    return os.write(fd, data)


class Writer(io.RawIOBase):
    """A raw file that hashes what it is given.

    Bytes written in order are hashed on the way; after a write elsewhere the file is read once
    more at the end.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.at = 0
        self.size = 0
        self._hash = hashlib.sha256()
        self._hashed = 0
        self._in_order = True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.size}[whence]
        self.at = base + offset
        return self.at

    def write(self, data: Any) -> int:
        """Write all of data; unlike a plain raw file, never less."""
        view = memoryview(data).cast("B")
        self._in_order &= self.at == self._hashed
        done = 0
        while done < len(view):
            done += write_at(self.fd, view[done : done + CHUNK], self.at + done)
        if self._in_order:
            self._hash.update(view)
            self._hashed += len(view)
        self.at += len(view)
        self.size = max(self.size, self.at)
        return len(view)

    def sha256(self) -> str:
        """Hash of the whole file so far."""
        if self._in_order:
            return self._hash.hexdigest()
        whole = hashlib.sha256()
        for start in range(0, self.size, PIECE):
            whole.update(read_at(self.fd, PIECE, start))
        return whole.hexdigest()


def sync(path: Path) -> None:
    """Wait until a file, or a folder's names, are on the disk."""
    fd = os.open(path, (os.O_RDWR if WINDOWS else os.O_RDONLY) | FLAGS)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_folder(folder: Path) -> None:
    """As sync, for a folder's names; Windows opens no folder, and writes names through."""
    if not WINDOWS:
        sync(folder)


def alive(pid: int) -> bool:
    """Whether a process lives; on Windows, where signal 0 would end it, always."""
    if WINDOWS:
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def abandoned(path: Path) -> bool:
    """Whether nobody holds the lock of a file (a pid alone may be of another container)."""
    try:
        fd = os.open(path, os.O_RDONLY | FLAGS)
    except OSError:
        return False
    try:
        hold(fd)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True
