"""One streaming pass from a checkpoint to the two files of the PiSSA workflow.

    B, A = round(principal factors of W)      R = W - B A      (fp32, then the residual's dtype)

R is taken against the *rounded* factors, that is against what a trainer holds at step 0; so the
precision of the adapter costs nothing and only the rounding of R is left. Sites that are not split
stay whole in the residual.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from recast.adapter.decompose import initial_metadata, matrices
from recast.adapter.file import (
    DTYPES,
    Adapter,
    file_metadata,
    kohya_hashes,
    low_rank_specs,
    low_rank_tensors,
)
from recast.adapter.places import Place, entry_name, places, refuse_residual
from recast.checkpoint import Checkpoint, write
from recast.errors import Refused
from recast.layout import Site
from recast.lowrank import LowRank, factorize

Specs = dict[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Split:
    """Hashes of the two files and the share of squared norm that each site's factors hold."""

    adapter_sha256: str
    residual_sha256: str
    energy: float
    energies: Mapping[str, float]


def split(
    checkpoint: Checkpoint,
    sites: Iterable[Site],
    rank: int,
    out_dir: Path,
    *,
    adapter_dtype: str = "F16",
    residual_dtype: str | None = None,
    method: str = "exact",
    force: bool = False,
) -> Split:
    """Write `adapter.safetensors` and `residual.safetensors` into a folder.

    residual_dtype None keeps each tensor's own dtype. Memory stays that of the largest tensor: the
    factors wait in an unnamed file until the residual is whole.
    """
    refuse_residual(checkpoint)
    adapter_path, residual_path = out_dir / "adapter.safetensors", out_dir / "residual.safetensors"
    for path in (adapter_path, residual_path):
        if path.exists() and not force:
            raise Refused(f"{path} exists; remove it, choose another folder or use --force.")
    out_dir.mkdir(parents=True, exist_ok=True)
    chosen = {entry_name(site): site for site in matrices(sites)}
    where = places(checkpoint, chosen)
    about = initial_metadata(checkpoint, "pissa-init", rank, method)
    with tempfile.TemporaryFile(dir=out_dir) as spool:
        run = _Run(checkpoint, where, rank, method, adapter_dtype, residual_dtype, spool)
        header = {**checkpoint.metadata, **about, "recast.role": "residual"}
        residual = write(
            residual_path,
            run.residual_specs(),
            run.residuals(),
            header,
            force=force,
            sources=[checkpoint.path],
        )
        energy = 1 - sum(run.left.values()) / max(sum(run.whole.values()), 1e-300)
        about |= {"recast.energy": f"{energy:.6f}", "recast.residual_sha256": residual}
        adapter = _write_spooled(adapter_path, run, about, force)
    shares = {n: 1 - run.left[n] / whole if whole else 1.0 for n, whole in run.whole.items()}
    return Split(adapter, residual, energy, shares)


class _Run:
    """State of one pass: what has been factored so far, and where its tensors wait."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        where: Mapping[str, list[Place]],
        rank: int,
        method: str,
        adapter_dtype: str,
        residual_dtype: str | None,
        spool: IO[bytes],
    ) -> None:
        self.checkpoint, self.where, self.rank, self.method = checkpoint, where, rank, method
        self.adapter_dtype, self.residual_dtype = adapter_dtype, residual_dtype
        self.spool = spool
        self.specs: Specs = {}
        self.spooled: dict[str, int] = {}
        self.left: dict[str, float] = {}
        self.whole: dict[str, float] = {}

    def residual_specs(self) -> Specs:
        """Names, dtypes and shapes of the residual file."""
        return {
            key: (self._dtype(key, spec.dtype), spec.shape)
            for key, spec in self.checkpoint.specs.items()
        }

    def residuals(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the residual file; the factors go to the spool on the way."""
        for key, spec in self.checkpoint.specs.items():
            tensor = self.checkpoint[key]
            if key in self.where:
                rest = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
                for place in self.where[key]:
                    self._subtract(place, place.view(rest), key)
                dtype = self._dtype(key, spec.dtype)
                tensor = rest.to(DTYPES.get(dtype, tensor.dtype))
            yield key, tensor

    def _dtype(self, key: str, own: str) -> str:
        return self.residual_dtype or own if key in self.where else own

    def _subtract(self, place: Place, weight: Tensor, key: str) -> None:
        """Factor one weight, spool its rounded factors and leave the residual in its place."""
        factors = factorize(weight, self.rank, method=self.method, name=key)
        rounded = factors.to(DTYPES[self.adapter_dtype])
        self.whole[place.name] = weight.double().square().sum().item()
        weight.sub_(rounded.dense())
        self.left[place.name] = weight.double().square().sum().item()
        lora = place.name.removesuffix(".weight")
        self.specs |= low_rank_specs(lora, factors.shape, self.rank, self.adapter_dtype)
        for name, tensor in low_rank_tensors(lora, rounded, float(self.rank)).items():
            self.spooled[name] = self.spool.tell()
            self.spool.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def factor(self, key: str) -> Tensor:
        """One tensor of the adapter again, from the spool."""
        dtype, shape = self.specs[key]
        self.spool.seek(self.spooled[key])
        raw = self.spool.read(torch.Size(shape).numel() * DTYPES[dtype].itemsize)
        return torch.frombuffer(bytearray(raw), dtype=DTYPES[dtype]).reshape(shape)


def _write_spooled(path: Path, run: _Run, about: Mapping[str, str], force: bool) -> str:
    shape_only = {"any.weight": LowRank(torch.empty(0, run.rank), torch.empty(run.rank, 0))}
    header = file_metadata(Adapter(shape_only, about), {})
    header |= kohya_hashes(run.specs, run.factor, header)
    return write(
        path, run.specs, ((key, run.factor(key)) for key in run.specs), header, force=force
    )
