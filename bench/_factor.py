"""What bench/split measures: the shapes of the models, the ways to factorise, one measurement."""

from __future__ import annotations

import ctypes
import gc
import math
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from recast.layout import SD15, SDXL
from recast.layout.sites import sites
from recast.layout.spectra import draw
from recast.lowrank import factorize

PROFILES = {"sdxl": (SDXL, "principal,te1,te2"), "sd15": (SD15, "principal,te1")}
SPECTRA = ("half", "steep", "flat")
RANKS = (16, 64, 256)
ROUNDS, QUICK = 5, 0.5  # rounds of the methods, and the seconds above which one round is enough
SQUARE_MB = 120  # the largest square factor of a full SVD that is still computed
Shape = tuple[int, ...]
Factors = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Figure:
    """One method on one shape; lost: a share of the optimum; peak_mb: None if times are rough."""

    shape: Shape
    method: str
    rank: int
    spectrum: str
    seconds: float
    lost: float
    peak_mb: float | None
    fell_back: str


def shapes() -> dict[str, Counter[Shape]]:
    """How often each model has each shape; a 1x1 convolution counts as the matrix it is."""
    return {
        name: Counter(
            site.shape[:2] if site.shape[2:] == (1, 1) else site.shape
            for site in sites(plan, profile)
        )
        for name, (plan, profile) in PROFILES.items()
    }


def weight(shape: Shape, spectrum: str, device: torch.device) -> Tensor:
    """A seeded weight as trained layers have them, in fp16 precision."""
    made = torch.Generator().manual_seed(0)
    return (draw(shape, spectrum, made) / 32).half().float().to(device)


def thin(w: Tensor, rank: int) -> Factors:
    u, s, vh = torch.linalg.svd(w.flatten(1), full_matrices=False)
    return u[:, : len(s)][:, :rank] * s[:rank], vh[: len(s)][:rank]


def whole(w: Tensor, rank: int) -> Factors:
    u, s, vh = torch.linalg.svd(w.flatten(1), full_matrices=True)
    return u[:, : len(s)][:, :rank] * s[:rank], vh[: len(s)][:rank]


def lowrank(w: Tensor, rank: int) -> Factors:
    torch.manual_seed(0)
    u, s, v = torch.svd_lowrank(w.flatten(1), q=min(rank, *w.flatten(1).shape), niter=4)
    return u * s, v.T


def lycoris(w: Tensor, rank: int) -> Factors:
    from lycoris.utils import extract_conv, extract_linear

    extract = extract_conv if w.ndim == 4 else extract_linear
    found, kind = extract(w, "fixed", rank, device=w.device)
    if kind == "full":  # it keeps the whole weight from half the rank on, after the same SVD
        return w.flatten(1), torch.eye(w[0].numel(), device=w.device)
    return found[1].flatten(1), found[0].flatten(1)


def ours(method: str, tally: Counter[str] | None = None) -> Callable[[Tensor, int], Factors]:
    def run(w: Tensor, rank: int) -> Factors:
        factors = factorize(w, rank, method=method, tally=tally)
        return factors.up, factors.down.flatten(1)

    return run


METHODS: dict[str, Callable[[Tensor, int], Factors]] = {
    "full SVD": whole,
    "LyCORIS extract": lycoris,
    "thin SVD": thin,
    "svd_lowrank niter 4": lowrank,
    "exact": ours("exact"),
    "fast": ours("fast"),
}
SQUARE = ("full SVD", "LyCORIS extract")  # both make a square factor of the long side


def too_large(shape: Shape, method: str) -> bool:
    """Whether a full SVD's square factor is beyond SQUARE_MB."""
    longest = max(shape[0], math.prod(shape[1:]))
    return method in SQUARE and longest**2 * 4 / 2**20 > SQUARE_MB


def optimum(w: Tensor) -> Tensor:
    """Squared singular values, falling, from the Gram matrix in fp64."""
    matrix = w.flatten(1).double()
    matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    return torch.linalg.eigvalsh(matrix @ matrix.T).clamp_min(0).flip(0)


def compare(
    w: Tensor, squares: Tensor, rank: int, spectrum: str, methods: list[str]
) -> list[Figure]:
    """The methods on a weight in turns, the least time of each; a slow one has one turn."""
    best: dict[str, float] = {}
    peaks: dict[str, float] = {}
    lost: dict[str, float] = {}
    for turn in range(ROUNDS):
        for method in methods:
            if turn and best[method] > QUICK:
                continue
            before = _mark(w.device)
            start = _clock(w.device)
            factors = METHODS[method](w, rank)
            seconds = _clock(w.device) - start
            best[method] = min(seconds, best.get(method, math.inf))
            if turn == 0:
                peaks[method] = _peak(w.device) - before
                lost[method] = _lost(w, factors, squares, rank)
    return [
        Figure(tuple(w.shape), m, rank, spectrum, best[m], lost[m], peaks[m], _fallback(w, rank, m))
        for m in methods
    ]


def lose(w: Tensor, squares: Tensor, rank: int, spectrum: str, method: str) -> Figure:
    """The energy that one of ours loses on a weight, and its time in one turn."""
    tally: Counter[str] = Counter()
    start = _clock(w.device)
    factors = ours(method, tally)(w, rank)
    seconds = _clock(w.device) - start
    lost = _lost(w, factors, squares, rank)
    return Figure(tuple(w.shape), method, rank, spectrum, seconds, lost, None, _reason(tally))


def _fallback(w: Tensor, rank: int, method: str) -> str:
    """Why fast was not fast, if it was not."""
    tally: Counter[str] = Counter()
    if method == "fast":
        ours(method, tally)(w, rank)
    return _reason(tally)


def _reason(tally: Counter[str]) -> str:
    return next((word for word in ("small", "untrusted") if tally[word]), "")


def _lost(w: Tensor, factors: Factors, squares: Tensor, rank: int) -> float:
    up, down = factors
    matrix = w.flatten(1).double()
    rest = matrix - up.double() @ down.double()
    held = (matrix.square().sum() - rest.square().sum()).item()
    best = squares[:rank].sum().item()
    return float((best - held) / best)


def _clock(device: torch.device) -> float:
    """CPU seconds of this process; on a GPU seconds, after what was asked of it."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def _mark(device: torch.device) -> float:
    """Start a new peak: MB held now."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    if sys.platform != "linux":
        return math.nan
    ctypes.CDLL(None).malloc_trim(0)  # or what is freed is taken again without a trace
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return _status("VmRSS")


def _peak(device: torch.device) -> float:
    """The most MB held since the mark."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return _status("VmHWM") if sys.platform == "linux" else math.nan


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))
