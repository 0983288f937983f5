"""Checkpoints: read one tensor at a time, written in one stream.

Reading is pread into fresh memory, never a mapping: streaming a 6.9 GB file adds the size of its
largest tensor to memory, and a file that another process truncates is an error, not a crash.
"""

from __future__ import annotations

import hashlib
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

from recast.commit import commit
from recast.disk import FLAGS, read_at
from recast.errors import Refused
from recast.header import (
    DTYPES,
    FLOATS,
    HEADER_LIMIT,
    Header,
    Spec,
    dtype_name,
    header_bytes,
    parse_header,
    place,
    refuse_kind,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "DTYPES",
    "FLOATS",
    "Checkpoint",
    "Spec",
    "Store",
    "dtype_name",
    "write",
    "write_dict",
]

CHUNK = 1 << 24


class Store(Protocol):
    """Where a checkpoint's tensors lie: one file, or whatever presents itself as one."""

    @property
    def path(self) -> Path: ...
    @property
    def files(self) -> tuple[Path, ...]: ...
    @property
    def specs(self) -> dict[str, Spec]: ...
    @property
    def metadata(self) -> dict[str, str]: ...
    @property
    def nbytes(self) -> int: ...
    def raw(self, key: str) -> bytearray: ...
    def sha256(self) -> str: ...
    def close(self) -> None: ...


class Checkpoint(Mapping[str, "Tensor"]):
    """A safetensors file as a mapping that reads a tensor each time it is asked for one.

    Keys come in the order of the data. Opening reads and checks only the header and raises Refused
    with a sentence for whatever is not a sound file. The file stays open, so that one replaced
    meanwhile is not mixed with its successor; `close` or a with statement ends that. A `store` may
    stand for the file; `recast.layout.open_checkpoint` has one for diffusers folders.
    """

    def __init__(
        self, path: Path | str, *, header_limit: int = HEADER_LIMIT, store: Store | None = None
    ) -> None:
        self.path = Path(path)
        self._store: Store = _File(self.path, header_limit) if store is None else store
        self.specs: dict[str, Spec] = self._store.specs
        self.metadata: dict[str, str] = self._store.metadata
        self._sha256: str | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that its bytes come from, which nothing may be written over."""
        return self._store.files

    @property
    def nbytes(self) -> int:
        """Size of its files together."""
        return self._store.nbytes

    def __getitem__(self, key: str) -> Tensor:
        """Read one tensor."""
        import torch

        spec = self.specs[key]
        if not spec.nbytes:
            return torch.empty(spec.shape, dtype=spec.torch_dtype)
        return torch.frombuffer(self.raw(key), dtype=spec.torch_dtype).reshape(spec.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def __contains__(self, key: object) -> bool:
        return key in self.specs

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; tensors read from it stay."""
        self._store.close()

    def raw(self, key: str) -> bytearray:
        """Read the bytes of one tensor."""
        return self._store.raw(key)

    def sha256(self) -> str:
        """Hash of the whole file, computed once."""
        if self._sha256 is None:
            self._sha256 = self._store.sha256()
        return self._sha256


class _File:
    """One open safetensors file."""

    def __init__(self, path: Path, header_limit: int) -> None:
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
        data = bytearray(spec.nbytes)
        _read_into(self.path, self._fd, memoryview(data), self._data + spec.start)
        return data

    def sha256(self) -> str:
        found, at = hashlib.sha256(), 0
        while chunk := read_at(self._fd, CHUNK, at):
            found.update(chunk)
            at += len(chunk)
        return found.hexdigest()


def write(
    path: Path | str,
    specs: Mapping[str, tuple[str, tuple[int, ...]]],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str],
    *,
    force: bool = False,
    sources: Sequence[Path | str] = (),
    twins: bool = False,
) -> str:
    """Stream tensors into a file that appears whole or not at all; returns its sha256.

    tensors come in the order of specs, with its dtypes and shapes (ValueError otherwise: that is a
    bug of the caller). The same content gives the same bytes.
    """
    placed = place(specs)
    head = header_bytes(placed, metadata)
    data = sum(spec.nbytes for spec in placed.values())
    parse_header(Path(path), head[8:], data)

    def fill(file: BinaryIO) -> None:
        file.write(head)
        wanted = iter(specs)
        for key, tensor in tensors:
            if key != next(wanted, None):
                raise ValueError(f"{key} does not come in the order of the specs")
            spec = placed[key]
            if (dtype_name(tensor.dtype), tuple(tensor.shape)) != (spec.dtype, spec.shape):
                raise ValueError(f"{key} is {tensor.dtype} {tuple(tensor.shape)}, not {spec}")
            if spec.nbytes:
                file.seek(len(head) + spec.start)
                file.write(_bytes(tensor))
            del tensor  # before the next is made
        if missing := next(wanted, None):
            raise ValueError(f"no tensor was given for {missing}")

    size = len(head) + data
    return commit(path, fill, size=size, force=force, sources=sources, twins=twins)


def write_dict(
    path: Path | str,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    force: bool = False,
    sources: Sequence[Path | str] = (),
    twins: bool = False,
) -> str:
    """As write, for tensors that are in memory; twins as of `commit`."""
    specs = {key: (dtype_name(t.dtype), tuple(t.shape)) for key, t in tensors.items()}
    about = metadata or {}
    return write(path, specs, tensors.items(), about, force=force, sources=sources, twins=twins)


def _bytes(tensor: Tensor) -> memoryview:
    import torch

    # torch calls a single element contiguous whatever its stride, and then cannot view it as bytes
    flat = tensor.detach().cpu().contiguous().as_strided((tensor.numel(),), (1,))
    return memoryview(flat.view(torch.uint8).numpy().data)


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
