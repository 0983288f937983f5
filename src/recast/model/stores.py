"""Checkpoints that are no plain safetensors file of the wanted dtype, as ones that are.

Pickled    a .ckpt of older trainers, read with torch's weights-only loader, which runs no code
Cast       another checkpoint with its networks' numbers in another dtype, rounded once
"""

from __future__ import annotations

import hashlib
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recast.checkpoint import CHUNK, DTYPES, FLOATS, Checkpoint, Spec, dtype_name
from recast.errors import CheckFailed, Refused
from recast.header import NAMES, place
from recast.layout import open_checkpoint
from recast.layout.names import is_extra

SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
STALE = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")


def open_any(path: Path, dtype: str | None = None) -> Checkpoint:
    """A safetensors file, a diffusers folder or a .ckpt, with its numbers in `dtype` if given.

    Raises Refused for a pickle that holds more than tensors, numbers and texts.
    """
    store = Pickled(path) if path.suffix.lower() in SUFFIXES and path.is_file() else None
    file = Checkpoint(path, store=store) if store else open_checkpoint(path)
    return Checkpoint(path, store=Cast(file, dtype)) if dtype else file


class Pickled:
    """The tensors of a .ckpt; the file's pages are read as they are needed where it is a zip."""

    def __init__(self, path: Path) -> None:
        self.path, self.files = path, (path,)
        self.metadata: dict[str, str] = {}
        self._tensors = tensors_of(path)
        self.specs: dict[str, Spec] = place(
            {key: (dtype_name(t.dtype), tuple(t.shape)) for key, t in self._tensors.items()}
        )

    @property
    def nbytes(self) -> int:
        return self.path.stat().st_size

    def raw(self, key: str) -> bytearray:
        return _bytes(self._tensors[key])

    def sha256(self) -> str:
        found = hashlib.sha256()
        with self.path.open("rb") as file:
            while chunk := file.read(CHUNK):
                found.update(chunk)
        return found.hexdigest()

    def close(self) -> None:
        self._tensors = {}


def tensors_of(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickled state dict by name; optimizer states and numbers are left."""
    try:
        found = _loaded(path)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else "damaged"
        raise Refused(
            f"{path} holds more than tensors, or is damaged ({reason}): nothing in it was run; "
            "take the model in safetensors form from where it came."
        ) from error
    state: Any = found.get("state_dict", found) if isinstance(found, dict) else None
    if not isinstance(state, dict) or not any(isinstance(t, Tensor) for t in state.values()):
        raise Refused(f"{path} holds no state dict of tensors: give a checkpoint.")
    kept = {str(key): tensor for key, tensor in state.items() if isinstance(tensor, Tensor)}
    odd = [
        key
        for key, tensor in kept.items()
        if tensor.layout != torch.strided or str(tensor.dtype).removeprefix("torch.") not in NAMES
    ]
    if odd:
        raise Refused(f"{path}: {odd[0]} is {kept[odd[0]].dtype}, which safetensors does not hold.")
    return kept


def _loaded(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about pickle protocols: what cannot be read is refused
        return _unpickled(path)


def _unpickled(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        return torch.load(path, map_location="cpu", weights_only=True)  # of before torch 1.6


class Cast:
    """A checkpoint whose networks' numbers are in one dtype; what no network reads stays."""

    def __init__(self, file: Checkpoint, dtype: str) -> None:
        self._file, self._dtype = file, dtype
        self.path, self.files = file.path, file.files
        self.metadata = {k: v for k, v in file.metadata.items() if k not in STALE}
        self.specs: dict[str, Spec] = place(
            {key: (self._of(key, spec), spec.shape) for key, spec in file.specs.items()}
        )

    def _of(self, key: str, spec: Spec) -> str:
        touched = spec.dtype in FLOATS and spec.nbytes and not is_extra(key)
        return self._dtype if touched else spec.dtype

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs.values())

    def raw(self, key: str) -> bytearray:
        if self.specs[key].dtype == self._file.specs[key].dtype:
            return self._file.raw(key)
        tensor = self._file[key]
        made = tensor.to(getattr(torch, DTYPES[self._dtype][1]))
        if not torch.isfinite(made).all() and torch.isfinite(tensor).all():
            raise CheckFailed(f"{key} leaves the range of {self._dtype}: choose bf16 or fp32.")
        return _bytes(made)

    def sha256(self) -> str:
        """Of no file yet: made of the source's and the dtype."""
        return hashlib.sha256(f"{self._file.sha256()} {self._dtype}".encode()).hexdigest()

    def close(self) -> None:
        self._file.close()


def _bytes(tensor: Tensor) -> bytearray:
    flat = tensor.detach().contiguous().reshape(-1)
    return bytearray(flat.view(torch.uint8).numpy().data) if flat.numel() else bytearray()
