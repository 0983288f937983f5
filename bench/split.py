"""Factorisation, ours and the field's, on every shape of SDXL and SD 1.5, on one thread.

    make bench-split                     all shapes (about half an hour)
    python bench/split.py --quick        six small shapes
    python bench/split.py --file m.safetensors     also: a whole file, with reading and writing

Weights are seeded: half of the squared norm a power law i^-0.5, half Gaussian noise, in fp16
precision; `steep` is nine tenths i^-1, `flat` nine tenths noise. Times are CPU seconds, the least
of three below a second. Sums multiply each shape by how often the model has it. Lost energy is what
the factors hold less than the best of their rank do, as a share of that. Peaks are above what the
process held before.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

from recast.layout import SD15, SDXL
from recast.layout.sites import sites
from recast.lowrank import factorize

RESULTS = Path(__file__).parent / "results"
SPECTRA = {"half": (0.5, 0.5), "steep": (0.9, 1.0), "flat": (0.1, 0.5)}
PROFILES = {"sdxl": (SDXL, "principal,te1,te2"), "sd15": (SD15, "principal,te1")}
RANKS = (16, 64, 256)
Shape = tuple[int, ...]
Factors = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Figure:
    """One method on one shape: CPU seconds, lost share of the optimum, peak MB."""

    shape: Shape
    method: str
    rank: int
    spectrum: str
    seconds: float
    lost: float
    peak_mb: float


def shapes() -> dict[str, Counter[Shape]]:
    """How often each model has each shape."""
    return {
        name: Counter(site.shape for site in sites(plan, profile))
        for name, (plan, profile) in PROFILES.items()
    }


def weight(shape: Shape, spectrum: str) -> Tensor:
    """A weight as trained layers have them."""
    made = torch.Generator().manual_seed(0)
    rows, columns = shape[0], torch.Size(shape[1:]).numel()
    side, (share, power) = min(rows, columns), SPECTRA[spectrum]
    u = torch.linalg.qr(torch.randn(rows, side, generator=made))[0]
    v = torch.linalg.qr(torch.randn(columns, side, generator=made))[0]
    law = torch.arange(1.0, side + 1) ** -power
    low = u * (law / law.norm()) @ v.T
    bulk = torch.randn(rows, columns, generator=made)
    mixed = share**0.5 * low + (1 - share) ** 0.5 * bulk / bulk.norm()
    return (30 * mixed).half().float().reshape(shape)


def thin(w: Tensor, rank: int) -> Factors:
    u, s, vh = torch.linalg.svd(w.flatten(1), full_matrices=False)
    return u[:, :rank] * s[:rank], vh[:rank]


def whole(w: Tensor, rank: int) -> Factors:
    u, s, vh = torch.linalg.svd(w.flatten(1), full_matrices=True)
    return u[:, :rank] * s[:rank], vh[:rank]


def lowrank(w: Tensor, rank: int) -> Factors:
    u, s, v = torch.svd_lowrank(w.flatten(1), q=min(rank, *w.flatten(1).shape), niter=4)
    return u * s, v.T


def lycoris(w: Tensor, rank: int) -> Factors:
    from lycoris.utils import extract_conv, extract_linear

    extract = extract_conv if w.ndim == 4 else extract_linear
    found, kind = extract(w, "fixed", rank)
    if kind == "full":  # it keeps the whole weight from half the rank on, after the same SVD
        return w.flatten(1), torch.eye(w[0].numel())
    return found[1].flatten(1), found[0].flatten(1)


def ours(method: str) -> Callable[[Tensor, int], Factors]:
    def run(w: Tensor, rank: int) -> Factors:
        factors = factorize(w, rank, method=method)
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


def optimum(w: Tensor) -> Tensor:
    """Squared singular values, falling, from the Gram matrix in fp64."""
    matrix = w.flatten(1).double()
    matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    return torch.linalg.eigvalsh(matrix @ matrix.T).clamp_min(0).flip(0)


def memory(field: str) -> float:
    """VmRSS or VmHWM of this process in MB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def measure(w: Tensor, squares: Tensor, method: str, rank: int, spectrum: str) -> Figure:
    """Run a method on a weight."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or what is freed is taken again without a trace
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the peak
    before = memory("VmRSS")
    times: list[float] = []
    while not times or (len(times) < 3 and times[-1] < 1):
        start = time.process_time()
        up, down = METHODS[method](w, rank)
        times.append(time.process_time() - start)
    peak = memory("VmHWM") - before
    rest = w.flatten(1).double() - up.double() @ down.double()
    held = (w.double().square().sum() - rest.square().sum()).item()
    best = squares[:rank].sum().item()
    return Figure(tuple(w.shape), method, rank, spectrum, min(times), (best - held) / best, peak)


def compare(chosen: list[Shape], rank: int) -> list[Figure]:
    """Every method on every shape, one after the other."""
    found = []
    for shape in chosen:
        w = weight(shape, "half")
        squares = optimum(w)
        for method in METHODS:
            found.append(measure(w, squares, method, rank, "half"))
            say(found[-1])
    return found


def energies(chosen: list[Shape]) -> list[Figure]:
    """Ours on every shape, spectrum and rank: only the lost energy matters."""
    found = []
    for shape in chosen:
        for spectrum in SPECTRA:
            w = weight(shape, spectrum)
            squares = optimum(w)
            for rank in (rank for rank in RANKS if rank <= min(w.flatten(1).shape)):
                for method in ("exact", "fast"):
                    found.append(measure(w, squares, method, rank, spectrum))
                    say(found[-1])
    return found


def end_to_end(file: Path, rank: int) -> dict[str, dict[str, float]]:
    """`cp` and whole splits of a file: wall and CPU seconds, and peak MB above an idle process."""
    code = (
        "import sys, resource, torch; from pathlib import Path\n"
        "from recast.adapter import split; from recast.checkpoint import Checkpoint\n"
        "from recast.layout import detect; torch.set_num_threads(1)\n"
        "base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "with Checkpoint(sys.argv[1]) as c:\n"
        "    split(c, detect(c).sites('principal'), int(sys.argv[3]), Path(sys.argv[2]), "
        "method=sys.argv[4])\n"
        "use = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print(use.ru_utime + use.ru_stime, (use.ru_maxrss - base) / 1024)\n"
    )
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        start = time.perf_counter()
        shutil.copyfile(file, Path(folder) / "copy")
        os.sync()
        figures["cp"] = {"wall": time.perf_counter() - start}
        for method in ("fast", "exact"):
            out, start = Path(folder) / method, time.perf_counter()
            words = [sys.executable, "-c", code, str(file), str(out), str(rank), method]
            done = subprocess.run(words, check=True, capture_output=True, text=True)
            cpu, peak = map(float, done.stdout.split())
            wall = time.perf_counter() - start
            figures[method] = {"wall": wall, "cpu": cpu, "peak_mb": peak}
            shutil.rmtree(out)
    return figures


def say(figure: Figure) -> None:
    shape = "x".join(map(str, figure.shape))
    print(
        f"{shape:>20}  {figure.method:<20} r{figure.rank:<4} {figure.spectrum:<6}"
        f"{figure.seconds:9.3f} s  lost {100 * figure.lost:9.5f} %  {figure.peak_mb:8.0f} MB",
        flush=True,
    )


def summed(figures: list[Figure], counts: Counter[Shape]) -> dict[str, dict[str, float]]:
    """Seconds over a model's layers, mean and worst loss, and the largest peak, by method."""
    sums: dict[str, dict[str, float]] = {}
    for method in METHODS:
        mine = [f for f in figures if f.method == method and f.shape in counts]
        layers = sum(counts[f.shape] for f in mine)
        if mine:
            sums[method] = {
                "seconds": sum(f.seconds * counts[f.shape] for f in mine),
                "lost_mean": sum(f.lost * counts[f.shape] for f in mine) / layers,
                "lost_worst": max(f.lost for f in mine),
                "peak_mb": max(f.peak_mb for f in mine),
                "layers": layers,
            }
    return sums


def page(result: dict) -> str:
    """The result as Markdown."""
    lines = [
        "# Split: factorisation",
        "",
        f"One thread, {result['cpu']}, torch {result['torch']}, rank {result['rank']}"
        f"{', a small subset of the shapes' if result['quick'] else ''}.",
    ]
    for name, sums in result["sums"].items():
        base = sums["thin SVD"]["seconds"]
        layers = int(sums["thin SVD"]["layers"])
        lines += ["", f"## {name}: {layers} layers", ""]
        lines += ["| method | CPU s | against thin SVD | energy lost, mean | worst | peak MB |"]
        lines += ["|---|--:|--:|--:|--:|--:|"]
        for method, s in sums.items():
            lines.append(
                f"| {method} | {s['seconds']:.1f} | {base / s['seconds']:.1f}x | "
                f"{100 * s['lost_mean']:.4f} % | {100 * s['lost_worst']:.4f} % | "
                f"{s['peak_mb']:.0f} |"
            )
    lines += ["", "## Energy lost, worst of all shapes", "", "| method | spectrum | "]
    lines[-1] += " | ".join(f"rank {rank}" for rank in RANKS) + " |"
    lines.append("|---|---|" + "--:|" * len(RANKS))
    for method in ("exact", "fast"):
        for spectrum in SPECTRA:
            worst = [result["energy"].get(f"{method} {spectrum} {rank}", 0.0) for rank in RANKS]
            cells = " | ".join(f"{100 * lost:.5f} %" for lost in worst)
            lines.append(f"| {method} | {spectrum} | {cells} |")
    for name, figures in (result["end_to_end"] or {}).items():
        numbers = ", ".join(f"{key} {value:.1f}" for key, value in figures.items())
        lines += [""] * (name == "cp") + [f"- whole file, {name}: {numbers}"]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="six small shapes")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--file", type=Path, help="also split this checkpoint as a whole")
    given = parser.parse_args()
    torch.set_num_threads(1)
    counts = shapes()
    every = sorted({s for c in counts.values() for s in c}, key=lambda s: torch.Size(s).numel())
    chosen = [s for s in every if min(s[0], s[1]) >= 320][:6] if given.quick else every
    figures = compare(chosen, given.rank)
    energy: dict[str, float] = {}
    for f in energies(chosen):
        key = f"{f.method} {f.spectrum} {f.rank}"
        energy[key] = max(energy.get(key, 0.0), f.lost)
    result = {
        "cpu": cpu(),
        "torch": torch.__version__,
        "rank": given.rank,
        "quick": given.quick,
        "sums": {name: summed(figures, count) for name, count in counts.items()},
        "energy": energy,
        "end_to_end": end_to_end(given.file, given.rank) if given.file else None,
        "figures": [asdict(figure) for figure in figures],
    }
    result["sums"] = {name: sums for name, sums in result["sums"].items() if sums}
    RESULTS.mkdir(parents=True, exist_ok=True)
    name = "split-quick" if given.quick else "split"
    text = json.dumps(result, indent=1)
    (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    (RESULTS / f"{name}.md").write_text(page(result), encoding="utf-8")
    print(page(result))


def cpu() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = (line.partition(":")[2].strip() for line in info if line.startswith("model name"))
    return next(names, "unknown processor")


if __name__ == "__main__":
    main()
