"""The tables of bench/split."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

from _factor import METHODS, RANKS, SPECTRA, SQUARE_MB, Figure, Shape

ABOUT = """
Seconds are {clock}, the least of five turns in which the methods alternate (one
turn where it takes over half a second), on one weight of each shape, times how often the model has
the shape; the spectrum is `half`, because the time of an SVD hardly depends on it. Lost energy is
what the factors hold less than the best of their rank do, as a share of that. Peaks are above what
the process held before. A full SVD makes a square factor of the long side; where that is beyond
{square} MB it was not run, and the thin SVD's time, which is less, stands for it (`at least`, with
the number of such layers).
"""


def summed(figures: list[Figure], counts: Counter[Shape]) -> dict[str, dict[str, float]]:
    """Seconds over a model's layers, mean and worst loss, and the largest peak, by method."""
    timed = {(f.method, f.shape): f for f in figures if f.peak_mb is not None}
    present = [shape for shape in counts if ("thin SVD", shape) in timed]
    sums: dict[str, dict[str, float]] = {}
    for method in METHODS if present else ():
        mine = {s: timed[method, s] for s in present if (method, s) in timed}
        stand_in = {s: timed["thin SVD", s] for s in present if s not in mine}
        layers = sum(counts[s] for s in mine)
        sums[method] = {
            "seconds": sum(f.seconds * counts[s] for s, f in (mine | stand_in).items()),
            "lost_mean": sum(f.lost * counts[s] for s, f in mine.items()) / layers,
            "lost_worst": max(f.lost for f in mine.values()),
            "peak_mb": max(f.peak_mb or 0.0 for f in mine.values()),
            "layers": layers,
            "missing": sum(counts.values()) - sum(counts[s] for s in present),
            "skipped": sum(counts[s] for s in stand_in),
        }
    return sums


def page(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    clock = "CPU seconds on one thread" if result["device"] == "cpu" else "seconds"
    lines = [
        "# Split: factorisation",
        "",
        f"{result['machine']}; torch {result['torch']}; rank {result['rank']}"
        f"{'; a small subset of the shapes' if result['quick'] else ''}.",
        ABOUT.format(clock=clock, square=SQUARE_MB).rstrip(),
    ]
    for name, sums in result["sums"].items():
        if sums:
            lines += _sums(name, sums)
    lines += _worst(result["figures"])
    lines += _shapes(result["figures"])
    lines += _files(result["end_to_end"], result["rank"])
    return "\n".join(lines) + "\n"


def _sums(name: str, sums: dict[str, dict[str, float]]) -> Iterator[str]:
    base, field = sums["thin SVD"]["seconds"], sums["svd_lowrank niter 4"]["seconds"]
    layers, missing = (int(sums["thin SVD"][key]) for key in ("layers", "missing"))
    left_out = f" measured, {missing} not yet" if missing else ""
    yield from ("", f"## {name}: {layers} layers{left_out}", "")
    yield (
        "| method | seconds | thin SVD / it | svd_lowrank / it | energy lost, mean | worst | "
        "peak MB |"
    )
    yield "|---|--:|--:|--:|--:|--:|--:|"
    for method, s in sums.items():
        at_least = f" (at least; {int(s['skipped'])} layers not run)" if s["skipped"] else ""
        yield (
            f"| {method} | {s['seconds']:.1f}{at_least} | {base / s['seconds']:.2f} | "
            f"{field / s['seconds']:.2f} | {100 * s['lost_mean']:.5f} % | "
            f"{100 * s['lost_worst']:.5f} % | {s['peak_mb']:.0f} |"
        )


def _worst(figures: list[dict[str, Any]]) -> Iterator[str]:
    ranked = {tuple(f["shape"]) for f in figures if f["spectrum"] == SPECTRA[-1]}
    timed = {
        tuple(f["shape"])
        for f in figures
        if f["peak_mb"] is not None and min(f["shape"][:2]) >= min(RANKS)
    }
    yield from ("", f"## Energy lost, the worst of {len(ranked)} shapes", "")
    if timed - ranked:
        names = ", ".join("x".join(map(str, shape)) for shape in sorted(timed - ranked))
        yield from (f"Only `half` at one rank was measured yet for {names}.", "")
    yield "| method | spectrum | " + " | ".join(f"rank {rank}" for rank in RANKS) + " |"
    yield "|---|---|" + "--:|" * len(RANKS)
    for method in ("exact", "fast"):
        for spectrum in SPECTRA:
            cells = []
            for rank in RANKS:
                mine = [
                    f["lost"]
                    for f in figures
                    if (f["method"], f["spectrum"], f["rank"]) == (method, spectrum, rank)
                    and rank <= min(f["shape"][0], math.prod(f["shape"][1:]))
                ]
                cells.append(f"{100 * max(mine):.5f} %" if mine else "–")
            yield f"| {method} | {spectrum} | {' | '.join(cells)} |"
    fast = [f for f in figures if f["method"] == "fast"]
    why = Counter(f["fell_back"] for f in fast)
    yield ""
    yield (
        f"Of {len(fast)} factorisations by `fast`, {why['small']} were taken by `exact` because "
        f"the rank is not small beside the shape, {why['untrusted']} because the search did not "
        "converge."
    )


def _shapes(figures: list[dict[str, Any]]) -> Iterator[str]:
    timed = [f for f in figures if f["peak_mb"] is not None]
    yield from ("", "## Milliseconds of each shape", "")
    yield "| shape | " + " | ".join(METHODS) + " |"
    yield "|---|" + "--:|" * len(METHODS)
    for shape in dict.fromkeys(tuple(f["shape"]) for f in timed):
        took = {f["method"]: 1000 * f["seconds"] for f in timed if tuple(f["shape"]) == shape}
        cells = (f"{took[m]:.1f}" if m in took else "–" for m in METHODS)
        yield f"| {'x'.join(map(str, shape))} | {' | '.join(cells)} |"


def _files(files: dict[str, dict[str, Any]], rank: int) -> Iterator[str]:
    if not files:
        return
    yield from ("", f"## Whole files, UNet and residual, reading and writing, rank {rank}", "")
    yield "| file | GB | what | wall s | CPU s | peak MB |"
    yield "|---|--:|---|--:|--:|--:|"
    for file, found in files.items():
        for what in ("cp", "fast", "exact"):
            f = found[what]
            cpu, peak = (f"{f[key]:.1f}" if key in f else "–" for key in ("cpu", "peak_mb"))
            size = f"{found['bytes'] / 1e9:.2f}"
            yield f"| {file} | {size} | {what} | {f['wall']:.1f} | {cpu} | {peak} |"
