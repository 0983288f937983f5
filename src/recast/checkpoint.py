"""Checkpoints: read one tensor at a time, written in one stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

from recast.commit import commit
from recast.header import (
    DTYPES,
    FLOATS,
    HEADER_LIMIT,
    Spec,
    dtype_name,
    header_bytes,
    parse_header,
    place,
)
from recast.opened import CHUNK, OpenFile

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "CHUNK",
    "DTYPES",
    "FLOATS",
    "Checkpoint",
    "Spec",
    "Store",
    "dtype_name",
    "write",
    "write_dict",
    "write_pieces",
]


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
        self._store: Store = OpenFile(self.path, header_limit) if store is None else store
        self.specs: dict[str, Spec] = self._store.specs
        self.metadata: dict[str, str] = self._store.metadata
        self._sha256: str | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that its bytes come from, which nothing may be written over."""
        return self._store.files

    @property
    def single(self) -> OpenFile | None:
        """The one file that holds the tensors as they are; None where a store makes them."""
        return self._store if isinstance(self._store, OpenFile) else None

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


def write_pieces(
    path: Path | str,
    specs: Mapping[str, tuple[str, tuple[int, ...]]],
    pieces: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str],
    last: Callable[[], Mapping[str, str]],
    *,
    force: bool = False,
    sources: Sequence[Path | str] = (),
) -> None:
    """As write, of tensors that come in pieces: one after the other, values in order, any shape.

    last: the metadata once all pieces were taken, of the same length in bytes as before: what is
    only known then, such as hashes of what was read (ValueError for another length). There is no
    hash of the file: its first bytes come last, so that would read it once more.
    """
    placed = place(specs)
    head = header_bytes(placed, metadata)
    data = sum(spec.nbytes for spec in placed.values())
    parse_header(Path(path), head[8:], data)

    def fill(file: BinaryIO) -> None:
        left = {key: spec.nbytes for key, spec in placed.items()}
        for key, piece in pieces:
            spec, size = placed[key], piece.numel() * piece.element_size()
            if dtype_name(piece.dtype) != spec.dtype or size > left[key]:
                raise ValueError(f"{key} is {spec}, and {size} bytes of {piece.dtype} are no part")
            if size:
                file.seek(len(head) + spec.end - left[key])
                file.write(_bytes(piece))
            left[key] -= size
            del piece  # before the next is made
        if short := [key for key, size in left.items() if size]:
            raise ValueError(f"{short[0]} has not come whole")
        final = header_bytes(placed, last())
        if len(final) != len(head):
            raise ValueError(f"the header has {len(final)} bytes, not {len(head)}")
        file.seek(0)
        file.write(final)

    size = len(head) + data
    commit(path, fill, size=size, force=force, sources=sources, hashed=False)


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
