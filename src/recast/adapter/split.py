"""One streaming pass from a checkpoint to the two files of the PiSSA workflow.

    B, A = round(principal factors of W)      R = W - B A      (fp32, then the residual's dtype)

R is taken against the *rounded* factors, that is against what a trainer holds at step 0; so the
precision of the adapter costs nothing and only the rounding of R is left. Sites that are not split
stay whole in the residual. Several weights are factored side by side, as many as torch has threads,
and the two files have the same bytes whatever their number.
"""

from __future__ import annotations

import math
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from recast.adapter.ahead import in_order
from recast.adapter.decompose import initial_metadata, matrices
from recast.adapter.file import (
    DTYPES,
    Adapter,
    file_metadata,
    kohya_hashes,
    low_rank_specs,
    low_rank_tensors,
)
from recast.adapter.places import Place, entry_name, places, refuse_residual, split_field, widened
from recast.adapter.ranks import Ranks, ranks
from recast.checkpoint import Checkpoint, write
from recast.commit import make_folder, require_room, standing
from recast.errors import Refused
from recast.header import DTYPES as WIDTHS
from recast.layout import Site
from recast.lowrank import METHODS, LowRank, factorize

Specs = dict[str, tuple[str, tuple[int, ...]]]
# what the residual of an original in fp8 is rounded to, whose own 2 or 3 bits would not hold it
FINER = {"F8_E4M3": "F16", "F8_E5M2": "F16"}


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

    rank: a number, or rules as `ranks` has them. residual_dtype None keeps each tensor's own dtype,
    but for fp8, whose residual is fp16. method: exact or fast; None takes fast on a GPU and exact
    elsewhere. Memory stays that of the largest tensor: the factors wait in an unnamed file until
    the residual is whole.
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
    where = places(checkpoint, chosen)
    alpha = rules.alpha(chosen.values())
    run = _Run(checkpoint, where, rules, alpha, method, adapter_dtype, residual_dtype, device)
    require_room(standing(out_dir), run.nbytes())
    make_folder(out_dir)
    about = initial_metadata(checkpoint, "pissa-init", rules, method)
    with tempfile.TemporaryFile(dir=out_dir) as spool:
        header = {**checkpoint.metadata, **about, "recast.role": "residual"}
        header |= split_field(chosen.values())
        residual = write(
            residual_path,
            run.residual_specs(),
            run.residuals(spool),
            header,
            force=force,
            sources=checkpoint.files,
        )
        energy = 1 - sum(run.left.values()) / max(sum(run.whole.values()), 1e-300)
        about |= {"recast.energy": f"{energy:.6f}", "recast.residual_sha256": residual}
        try:
            adapter = _write_spooled(adapter_path, run, spool, about, force)
        except BaseException:
            residual_path.unlink(missing_ok=True)  # worth nothing without its adapter
            raise
    shares = {n: 1 - run.left[n] / whole if whole else 1.0 for n, whole in run.whole.items()}
    return Split(adapter, residual, energy, shares, run.ranks, dict(run.tally))


@dataclass(frozen=True)
class _Piece:
    """One weight taken apart: its rounded factors, and the squared norms of it and its rest."""

    place: Place
    factors: LowRank
    whole: float
    left: float
    tally: Counter[str]


@dataclass
class _Run:
    """One pass: what is asked of it, what has been factored so far, and where its tensors wait."""

    checkpoint: Checkpoint
    where: Mapping[str, list[Place]]
    rules: Ranks
    alpha: float
    method: str
    adapter_dtype: str
    residual_dtype: str | None
    device: str
    ranks: dict[str, int] = field(default_factory=dict)
    tally: Counter[str] = field(default_factory=Counter)
    specs: Specs = field(default_factory=dict)
    spooled: dict[str, int] = field(default_factory=dict)
    left: dict[str, float] = field(default_factory=dict)
    whole: dict[str, float] = field(default_factory=dict)
    reading: threading.Lock = field(default_factory=threading.Lock)

    def residual_specs(self) -> Specs:
        """Names, dtypes and shapes of the residual file."""
        return {
            key: (self._dtype(key, spec.dtype), spec.shape)
            for key, spec in self.checkpoint.specs.items()
        }

    def nbytes(self) -> int:
        """Size of what will be written, as far as the ranks are known: the factors twice."""
        values = 0
        for place in (place for listed in self.where.values() for place in listed):
            rank, shape = self.rules.wanted(place.site), place.site.shape
            values += rank * (shape[0] + math.prod(shape[1:])) if isinstance(rank, int) else 0
        factors = 2 * values * DTYPES[self.adapter_dtype].itemsize
        return factors + sum(
            math.prod(shape) * WIDTHS[dtype][0] for dtype, shape in self.residual_specs().values()
        )

    def residuals(self, spool: IO[bytes]) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the residual file; the factors go to the spool on the way."""
        specs = self.checkpoint.specs
        jobs = (
            (partial(self._taken_apart, key), specs[key].numel if key in self.where else 0)
            for key in specs
        )
        threads = torch.get_num_threads() if self.device == "cpu" else 1
        room = max(specs[key].numel for key in self.where)
        for key, tensor, pieces in in_order(jobs, threads=threads, room=room):
            for piece in pieces:
                self._keep(piece, spool)
            yield key, tensor
            del tensor, pieces  # before the next is read

    def _dtype(self, key: str, own: str) -> str:
        return self.residual_dtype or FINER.get(own, own) if key in self.where else own

    def _taken_apart(self, key: str) -> tuple[str, Tensor, list[_Piece]]:
        """The rest of one tensor in its dtype, and what was taken from it."""
        with self.reading:
            tensor = self.checkpoint[key]
        if key not in self.where:
            return key, tensor, []
        kind = DTYPES.get(self._dtype(key, self.checkpoint.specs[key].dtype), tensor.dtype)
        rest = widened(tensor)
        del tensor
        pieces = [self._subtract(place, place.view(rest), key) for place in self.where[key]]
        result = rest.to(kind)
        # no number is larger than the norm, which is known
        if sum(piece.left for piece in pieces) > torch.finfo(kind).max ** 2:
            _refuse_overflow(key, result)
        return key, result, pieces

    def _subtract(self, place: Place, weight: Tensor, key: str) -> _Piece:
        """Factor one weight and leave what its rounded factors do not hold in its place."""
        work = weight.to(self.device)
        tally: Counter[str] = Counter()
        factors = factorize(
            work, self.rules.wanted(place.site), method=self.method, name=key, tally=tally
        )
        scale = self.alpha / factors.rank
        stored = LowRank(factors.up / scale, factors.down).to(DTYPES[self.adapter_dtype])
        matrix = work.view(len(work), -1)
        whole = _square(matrix)
        up, down = stored.up.to(work.dtype) * scale, stored.down.to(work.dtype).flatten(1)
        matrix.addmm_(up, down, alpha=-1)
        if work is not weight:
            weight.copy_(work)
        return _Piece(
            place, LowRank(stored.up.cpu(), stored.down.cpu()), whole, _square(matrix), tally
        )

    def _keep(self, piece: _Piece, spool: IO[bytes]) -> None:
        """Note one weight's figures and spool its factors."""
        name, factors = piece.place.name, piece.factors
        self.whole[name], self.left[name] = piece.whole, piece.left
        self.ranks[name] = factors.rank
        self.tally.update(piece.tally)
        lora = name.removesuffix(".weight")
        self.specs |= low_rank_specs(lora, factors.shape, factors.rank, self.adapter_dtype)
        for key, tensor in low_rank_tensors(lora, factors, self.alpha, folded=True).items():
            self.spooled[key] = spool.tell()
            data = tensor.contiguous().reshape(-1).view(torch.uint8)
            spool.write(data.numpy().data)

    def factor(self, spool: IO[bytes], key: str) -> Tensor:
        """One tensor of the adapter again, from the spool."""
        dtype, shape = self.specs[key]
        spool.seek(self.spooled[key])
        raw = spool.read(torch.Size(shape).numel() * DTYPES[dtype].itemsize)
        return torch.frombuffer(bytearray(raw), dtype=DTYPES[dtype]).reshape(shape)


def _square(matrix: Tensor) -> float:
    """Squared norm, row by row: no tensor of the matrix's size is made to find it."""
    return torch.linalg.vector_norm(matrix, dim=1).double().square().sum().item()


def _refuse_overflow(key: str, result: Tensor) -> None:
    if not all(math.isfinite(end.item()) for end in result.aminmax()):
        raise Refused(
            f"the residual of {key} leaves the range of {result.dtype}: give --residual-dtype bf16 "
            "or fp32."
        )


def _write_spooled(
    path: Path, run: _Run, spool: IO[bytes], about: Mapping[str, str], force: bool
) -> str:
    shapes = {
        name: LowRank(torch.empty(0, rank), torch.empty(rank, 0))
        for name, rank in run.ranks.items()
    }
    header = file_metadata(Adapter(shapes, about), {}, run.alpha)
    read = partial(run.factor, spool)
    header |= kohya_hashes(run.specs, read, header)
    return write(path, run.specs, ((key, read(key)) for key in run.specs), header, force=force)
