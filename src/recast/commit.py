"""Files and folders that appear whole or not at all.

A file is written to a temporary one in the same folder, hashed on the way, synced, and renamed over
its target: os.replace is the commit point, so a kill at any moment leaves the old file or the new
one.  A folder is filled under a temporary name, gets a manifest (sizes and hashes) last and is then
renamed; without a right manifest it does not exist.

A temporary file is held by a lock while its owner lives: who wants to write the same file meanwhile
is refused, and `sweep` removes those of dead owners.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, cast

from recast.disk import (
    FLAGS,
    WINDOWS,
    Writer,
    abandoned,
    alive,
    hold,
    read_at,
    sync,
    sync_folder,
    write_at,
)
from recast.errors import NoRoom, Refused

TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)-\d+\.recast-tmp")
MANIFEST = "manifest.json"
SPARE = 1.05  # of the announced size must be free: file systems need room for their own books
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FORBIDDEN = (
    errno.EACCES, errno.EEXIST, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG,
)  # fmt: skip
_counter = itertools.count()


def commit(
    path: Path | str,
    write: Callable[[BinaryIO], object],
    *,
    size: int,
    force: bool = False,
    sources: Sequence[Path | str] = (),
    twins: bool = False,
    hashed: bool = True,
) -> str:
    """Let `write` fill a file, make it appear at path in one step and return its sha256.

    size: bytes that will be written, for the space check. sources: files the content is read from,
    never overwritten, not even by force. twins: others may be writing the same bytes there, the
    last one wins; else a second writer is refused. hashed: else the hash is "", and a file that was
    not written in order is not read for it. Missing folders are created. Raises Refused
    (nothing written) or NoRoom (what was there before still is).
    """
    path = Path(path)
    refuse_target(path, force=force, sources=sources, twins=twins)
    with _named_errors(path, size):
        swept = standing(path.parent)
        sweep(swept)
        require_room(swept, size)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary, fd = _create(path)
        try:
            try:
                if not twins:  # who began at the same moment: neither goes on
                    _refuse_rival(path, temporary)
                digest = _fill(fd, write, hashed=hashed)
                if path.exists() and not force:  # since the work began
                    raise Refused(f"{path} has appeared meanwhile: name another file.")
                if not WINDOWS:
                    os.replace(temporary, path)  # noqa: PTH105 (tests make os fail)
            finally:
                os.close(fd)
            if WINDOWS:  # which renames no open file
                os.replace(temporary, path)  # noqa: PTH105
        except BaseException:
            with suppress(FileNotFoundError):
                temporary.unlink()
            raise
        sync_folder(path.parent)
    return digest


def refuse_target(
    path: Path, *, force: bool = False, sources: Sequence[Path | str] = (), twins: bool = False
) -> None:
    """Raise Refused where commit would, so that long work can be refused before it begins."""
    for source in sources:
        if path.exists() and Path(source).exists() and path.samefile(source):
            raise Refused(f"{path} is also the source {source}: name another file to write.")
    if path.is_dir():
        raise Refused(f"{path} is a folder: name a file to write.")
    if path.exists() and not force:
        raise Refused(f"{path} exists: name another file, or give --force to replace it.")
    if not twins:
        _refuse_rival(path)


def require_room(folder: Path, size: int) -> None:
    """Raise NoRoom unless size bytes and five per cent more are free in folder."""
    free = shutil.disk_usage(folder).free
    needed = int(size * SPARE)
    if free < needed:
        raise NoRoom(
            f"{folder} has {free:,} bytes free and {needed:,} are needed: make room "
            "there, or write to another disk."
        )


def make_folder(folder: Path) -> None:
    """Make a folder unless it is there; raises Refused where it cannot be."""
    with _named_errors(folder, 0):
        folder.mkdir(parents=True, exist_ok=True)


def sweep(folder: Path) -> None:
    """Remove temporary files and folders whose owner is dead."""
    for found in folder.glob(".*.recast-tmp"):
        match = TEMPORARY.fullmatch(found.name)
        if match is None or alive(int(match["pid"])) or found.is_symlink():
            continue
        if found.is_dir():
            shutil.rmtree(found, ignore_errors=True)
        elif abandoned(found):
            found.unlink(missing_ok=True)


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold folder/.lock; raises Refused, naming the process that holds it already."""
    make_folder(folder)
    with _named_errors(folder, 0):
        fd = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | FLAGS, 0o666)
    try:
        try:
            hold(fd)
        except (BlockingIOError, PermissionError) as error:
            owner = read_at(fd, 20, 0).decode("ascii", "replace").strip() or "unknown"
            raise Refused(
                f"{folder} is in use by process {owner}: wait for it to end, or work in "
                "another folder."
            ) from error
        os.ftruncate(fd, 0)
        write_at(fd, b"%d\n" % os.getpid(), 0)
        yield
    finally:
        os.close(fd)


def commit_folder(path: Path | str, fill: Callable[[Path], object]) -> None:
    """Let `fill` write files into a temporary folder and make it appear at path in one step.

    Raises Refused if path exists.
    """
    path = Path(path)
    if path.exists():
        raise Refused(f"{path} exists: name another folder, or remove it first.")
    with _named_errors(path, 0):
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        temporary = _temporary(path)
        temporary.mkdir()
        try:
            fill(temporary)
            _seal(temporary)
            os.rename(temporary, path)  # noqa: PTH104 (tests make os fail)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync_folder(path.parent)


def valid_folder(path: Path | str) -> bool:
    """Whether a folder's manifest is there and every file has the size and hash it states."""
    path = Path(path)
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
        if manifest.keys() != _files(path).keys():
            return False
        return all(_fact(path / name) == fact for name, fact in manifest.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _create(path: Path) -> tuple[Path, int]:
    temporary = _temporary(path)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | FLAGS
    fd = os.open(temporary, flags, 0o666)
    hold(fd)
    return temporary, fd


def _refuse_rival(path: Path, mine: Path | None = None) -> None:
    """Refuse a file that another process, or this one, is writing."""
    for found in path.parent.glob(f".{glob.escape(path.name)}.*.recast-tmp"):
        match = TEMPORARY.fullmatch(found.name)
        rival = match is not None and match["name"] == path.name and found != mine
        if match and rival and found.is_file() and not abandoned(found) and found.exists():
            raise Refused(
                f"{path} is being written by process {match['pid']}: wait for it to end, or name "
                "another file."
            )


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}-{next(_counter)}.recast-tmp")


def _fill(fd: int, write: Callable[[BinaryIO], object], *, hashed: bool) -> str:
    with Writer(fd) as file:
        write(cast(BinaryIO, file))
        os.fsync(fd)
        if os.fstat(fd).st_size != file.size:
            raise OSError(errno.EIO, "the file is not as long as what was written to it")
        return file.sha256() if hashed else ""


def _seal(folder: Path) -> None:
    """Sync every file of a folder and write the manifest last."""
    files = _files(folder)
    for file in files.values():
        sync(file)
    manifest = {"files": {name: _fact(file) for name, file in files.items()}}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    sync(folder / MANIFEST)
    for inner in [folder, *(d for d in folder.rglob("*") if d.is_dir())]:
        sync_folder(inner)


def _files(folder: Path) -> dict[str, Path]:
    found = sorted(p for p in folder.rglob("*") if p.is_file())
    names = {p.relative_to(folder).as_posix(): p for p in found}
    names.pop(MANIFEST, None)
    return names


def _fact(path: Path) -> dict[str, object]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


@contextmanager
def _named_errors(path: Path, size: int) -> Iterator[None]:
    """Turn what the system says about a target into a sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            free = shutil.disk_usage(standing(path)).free
            need = f"{size:,} bytes are needed and {free:,}" if size else f"{free:,} bytes"
            raise NoRoom(
                f"{path} could not be written, {need} are free: make room there, or "
                "write to another disk."
            ) from error
        if error.errno in FORBIDDEN:
            raise Refused(
                f"{path} cannot be written ({error.strerror}): choose another place or "
                "change its permissions."
            ) from error
        raise


def standing(path: Path) -> Path:
    """The nearest folder that exists, path itself or one above it."""
    return next(place for place in (path, *path.absolute().parents) if place.is_dir())
