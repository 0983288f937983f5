"""One streaming pass from a checkpoint to the two files of the PiSSA workflow.

    B, A = round(principal factors of W)      R = W - B A      (fp32, then the residual's dtype)

R is taken against the *rounded* factors, that is against what a trainer holds at step 0; so the
precision of the adapter costs nothing and only the rounding of R is left. Sites that are not split
stay whole in the residual.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from recast.adapter.places import Place, entry_name, places, refuse_residual, split_field
from recast.adapter.ranks import Ranks, ranks
from recast.checkpoint import Checkpoint, write
from recast.commit import make_folder, require_room, standing
from recast.errors import Refused
from recast.layout import Site
from recast.lowrank import METHODS, LowRank, factorize

Specs = dict[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Split:
    """Hashes of the two files, the share of squared norm that each site's factors hold, its rank.

    methods: how often each way of factorising was taken, as `lowrank.factorize` counts them.
    """

    adapter_sha256: str
    residual_sha256: str
    energy: float
    energies: Mapping[str, float]
    ranks: Mapping[str, int]
    methods: Mapping[str, int]


def split(
    checkpoint: Checkpoint,
    sites: Iterable[Site],
    rank: int | Sequence[str] | Ranks,
    out_dir: Path,
    *,
    adapter_dtype: str = "F16",
    residual_dtype: str | None = None,
    method: str | None = None,
    device: str = "cpu",
    force: bool = False,
) -> Split:
    """Write `adapter.safetensors` and `residual.safetensors` into a folder.

    rank: a number, or rules as `ranks` has them. residual_dtype None keeps each tensor's own dtype.
    method: exact or fast; None takes fast on a GPU and exact elsewhere. Memory stays that of the
    largest tensor: the factors wait in an unnamed file until the residual is whole.
    """
    refuse_residual(checkpoint)
    rules = ranks(rank)
    method = method or ("exact" if device == "cpu" else "fast")
    if method not in METHODS:
        raise Refused(f"--method {method!r}: choose {' or '.join(METHODS)}.")
    adapter_path, residual_path = out_dir / "adapter.safetensors", out_dir / "residual.safetensors"
    for path in (adapter_path, residual_path):
        if path.exists() and not force:
            raise Refused(f"{path} exists; remove it, choose another folder or use --force.")
    chosen = {entry_name(site): site for site in matrices(sites)}
    rules.check(chosen.values())
    require_room(standing(out_dir), checkpoint.nbytes)
    make_folder(out_dir)
    where = places(checkpoint, chosen)
    about = initial_metadata(checkpoint, "pissa-init", rules, method)
    with tempfile.TemporaryFile(dir=out_dir) as spool:
        alpha = rules.alpha(chosen.values())
        run = _Run(
            checkpoint, where, rules, alpha, method, adapter_dtype, residual_dtype, device, spool
        )
        header = {**checkpoint.metadata, **about, "recast.role": "residual"}
        header |= split_field(chosen.values())
        residual = write(
            residual_path,
            run.residual_specs(),
            run.residuals(),
            header,
            force=force,
            sources=checkpoint.files,
        )
        energy = 1 - sum(run.left.values()) / max(sum(run.whole.values()), 1e-300)
        about |= {"recast.energy": f"{energy:.6f}", "recast.residual_sha256": residual}
        adapter = _write_spooled(adapter_path, run, about, force)
    shares = {n: 1 - run.left[n] / whole if whole else 1.0 for n, whole in run.whole.items()}
    return Split(adapter, residual, energy, shares, run.ranks, dict(run.tally))


class _Run:
    """State of one pass: what has been factored so far, and where its tensors wait."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        where: Mapping[str, list[Place]],
        rules: Ranks,
        alpha: float,
        method: str,
        adapter_dtype: str,
        residual_dtype: str | None,
        device: str,
        spool: IO[bytes],
    ) -> None:
        self.checkpoint, self.where, self.rules, self.alpha = checkpoint, where, rules, alpha
        self.adapter_dtype, self.residual_dtype = adapter_dtype, residual_dtype
        self.method, self.device, self.spool = method, device, spool
        self.ranks: dict[str, int] = {}
        self.tally: Counter[str] = Counter()
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
        work = weight.to(self.device)
        factors = factorize(
            work, self.rules.wanted(place.site), method=self.method, name=key, tally=self.tally
        )
        scale = self.alpha / factors.rank
        stored = LowRank(factors.up / scale, factors.down).to(DTYPES[self.adapter_dtype])
        self.whole[place.name] = work.double().square().sum().item()
        work.sub_(LowRank(stored.up.float() * scale, stored.down).dense())
        self.left[place.name] = work.double().square().sum().item()
        if work is not weight:
            weight.copy_(work)
        self.ranks[place.name] = factors.rank
        lora = place.name.removesuffix(".weight")
        self.specs |= low_rank_specs(lora, factors.shape, factors.rank, self.adapter_dtype)
        for name, tensor in low_rank_tensors(lora, stored, self.alpha, folded=True).items():
            self.spooled[name] = self.spool.tell()
            data = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
            self.spool.write(data.numpy().data)

    def factor(self, key: str) -> Tensor:
        """One tensor of the adapter again, from the spool."""
        dtype, shape = self.specs[key]
        self.spool.seek(self.spooled[key])
        raw = self.spool.read(torch.Size(shape).numel() * DTYPES[dtype].itemsize)
        return torch.frombuffer(bytearray(raw), dtype=DTYPES[dtype]).reshape(shape)


def _write_spooled(path: Path, run: _Run, about: Mapping[str, str], force: bool) -> str:
    shapes = {
        name: LowRank(torch.empty(0, rank), torch.empty(rank, 0))
        for name, rank in run.ranks.items()
    }
    header = file_metadata(Adapter(shapes, about), {}, run.alpha)
    header |= kohya_hashes(run.specs, run.factor, header)
    return write(
        path, run.specs, ((key, run.factor(key)) for key in run.specs), header, force=force
    )
