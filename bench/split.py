"""Factorisation, ours and the field's, on every shape of SDXL and SD 1.5, on one thread.

    make bench-split                     every shape; goes on where it was stopped
    python bench/split.py --quick        six small shapes
    python bench/split.py --device cuda  the same on a GPU
    python bench/split.py --so-far       the tables of what a stopped run has measured
    python bench/split.py --file m.safetensors     only a whole file, with reading and writing

Weights are seeded, as `scripts/make_checkpoint.py` writes them: half of the squared norm a power
law i^-0.5, half Gaussian noise, in fp16 precision; `steep` is nine tenths i^-1, `flat` nine tenths
noise.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from itertools import product
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from _factor import METHODS, RANKS, SPECTRA, Figure, Shape, compare, lose, optimum, shapes, weight
from _factor import too_large as large
from _factor_page import page, summed
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import recast.lowrank
import recast.subspace

RESULTS = Path(__file__).parent / "results"
PARTIAL = Path(__file__).parents[1] / "runs" / "bench-split"
OURS = ("exact", "fast")


def times(shape: Shape, rank: int, device: torch.device) -> list[Figure]:
    """All methods at one rank and spectrum."""
    w = weight(shape, SPECTRA[0], device)
    chosen = [method for method in METHODS if not large(shape, method)]
    return compare(w, optimum(w), rank, SPECTRA[0], chosen)


def energies(shape: Shape, rank: int, device: torch.device) -> list[Figure]:
    """What ours lose at the ranks and spectra that `times` has not measured."""
    found = []
    for spectrum in SPECTRA:
        w = weight(shape, spectrum, device)
        squares = optimum(w)
        for other in RANKS:
            new = (spectrum, other) != (SPECTRA[0], rank)
            if new and other <= min(w.flatten(1).shape):
                found += [lose(w, squares, other, spectrum, method) for method in OURS]
    return found


def every(
    chosen: list[Shape], rank: int, device: torch.device, partial: Path, so_far: bool
) -> list[Figure]:
    """The figures of all shapes; what is measured of a shape is written down at once."""
    found: list[Figure] = []
    columns = (TextColumn("{task.description:<25}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn()) as bar:
        task = bar.add_task("", total=2 * len(chosen))
        for measure, shape in product((times, energies), chosen):
            name = f"{'x'.join(map(str, shape))}.{measure.__name__}"
            bar.update(task, description=name)
            file = partial / f"{name}.json"
            if so_far and not file.exists():
                continue
            if not file.exists():
                figures = [asdict(figure) for figure in measure(shape, rank, device)]
                partial.mkdir(parents=True, exist_ok=True)
                file.with_suffix(".part").write_text(json.dumps(figures), encoding="utf-8")
                file.with_suffix(".part").rename(file)
            for made in json.loads(file.read_text(encoding="utf-8")):
                found.append(Figure(**made | {"shape": tuple(made["shape"])}))
                bar.console.print(line(found[-1]), highlight=False, soft_wrap=True)
            bar.advance(task)
    return found


def line(figure: Figure) -> str:
    shape = "x".join(map(str, figure.shape))
    peak = "" if figure.peak_mb is None else f"{figure.peak_mb:6.0f} MB"
    return (
        f"{shape:>15} {figure.method:<20}r{figure.rank:<4}{figure.spectrum:<6}"
        f"{figure.seconds:8.3f} s  lost {100 * figure.lost:8.5f} % {peak} {figure.fell_back}"
    )


WHOLE_FILE = """
import resource, sys
from pathlib import Path
import torch
from recast.adapter import split
from recast.checkpoint import Checkpoint
from recast.layout import detect
torch.set_num_threads(1)
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with Checkpoint(sys.argv[1]) as c:
    chosen = detect(c).sites("principal")
    split(c, chosen, int(sys.argv[3]), Path(sys.argv[2]), method=sys.argv[4], device=sys.argv[5])
use = resource.getrusage(resource.RUSAGE_SELF)
print(use.ru_utime + use.ru_stime, (use.ru_maxrss - base) / 1024)
"""


def end_to_end(file: Path, rank: int, device: str) -> dict[str, dict[str, float]]:
    """`cp` and whole splits of a file: wall and CPU seconds, and peak MB above an idle process."""
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        start = time.perf_counter()
        shutil.copyfile(file, Path(folder) / "copy")
        os.sync()
        figures["cp"] = {"wall": time.perf_counter() - start}
        for method in ("fast", "exact"):
            out, start = Path(folder) / method, time.perf_counter()
            words = [
                sys.executable,
                "-c",
                WHOLE_FILE,
                str(file),
                str(out),
                str(rank),
                method,
                device,
            ]
            done = subprocess.run(words, check=True, capture_output=True, text=True)
            cpu, peak = map(float, done.stdout.split())
            wall = time.perf_counter() - start
            figures[method] = {"wall": wall, "cpu": cpu, "peak_mb": peak}
            shutil.rmtree(out)
    return figures


def machine(device: str) -> str:
    """The processor's name, or the GPU's."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    units = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    return ", ".join([next(names, "unknown processor"), *units])


def version(rank: int, device: str) -> str:
    """Changes with whatever the figures depend on."""
    parts = [Path(m.__file__).read_bytes() for m in (recast.lowrank, recast.subspace)]
    parts.append(f"{torch.__version__} {machine(device)} {rank}".encode())
    return hashlib.sha256(b"".join(parts)).hexdigest()[:12]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="six small shapes")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--so-far", action="store_true", help="measure nothing, show what there is")
    parser.add_argument("--file", type=Path, help="split this checkpoint as a whole, nothing else")
    given = parser.parse_args()
    torch.set_num_threads(1)
    name = "split" + ("-quick" if given.quick else "") + ("-cuda" if given.device != "cpu" else "")
    target = RESULTS / f"{name}.json"
    if given.file:
        result = json.loads(target.read_text(encoding="utf-8"))
        result["end_to_end"][given.file.name] = {
            "bytes": given.file.stat().st_size,
            **end_to_end(given.file, given.rank, given.device),
        }
    else:
        result = shape_by_shape(given.quick, given.rank, given.device, given.so_far)
    RESULTS.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    target.with_suffix(".md").write_text(page(result), encoding="utf-8")
    print(page(result))


def shape_by_shape(quick: bool, rank: int, device: str, so_far: bool) -> dict:
    counts: dict[str, Counter[Shape]] = shapes()
    chosen = sorted({s for c in counts.values() for s in c}, key=lambda s: torch.Size(s).numel())
    if quick:
        chosen = [s for s in chosen if min(s[0], s[1]) >= 320][:6]
    partial = PARTIAL / version(rank, device)
    figures = every(chosen, rank, torch.device(device), partial, so_far)
    return {
        "machine": machine(device),
        "torch": torch.__version__,
        "rank": rank,
        "quick": quick,
        "device": device,
        "sums": {name: summed(figures, count) for name, count in counts.items()},
        "end_to_end": {},
        "figures": [asdict(figure) for figure in figures],
    }


if __name__ == "__main__":
    main()
