"""The table of bench/convert: every seed, mean and 95 % interval (Student's t over seeds)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from _arms import Arm

Row = dict[str, Any]
# two-sided 97.5 % quantiles of Student's t for 1 to 9 degrees of freedom
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
HEAD = (
    "| arm | what | PSNR, mean | ± 95 % | each seed | to the wrapper | ceiling | alignment "
    "| retention | watermarks | forwards | CPU s |"
)


def interval(values: list[float]) -> float:
    """Half the width of the 95 % interval of the mean; infinite for one value."""
    if len(values) < 2:
        return math.inf
    return STUDENT[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))


def page(rows: list[Row], arms: Mapping[str, Arm], about: str, claims: Sequence[str] = ()) -> str:
    """The claims and the rows as Markdown."""
    text = ["# bench/convert", "", about.strip(), "", "## What it must show", "", *claims, ""]
    text += ["## Every arm", ""]
    text += [HEAD, "|" + "---|" * HEAD.count(" |")]
    for name, arm in arms.items():
        mine = [row for row in rows if row["arm"] == name]
        text += list(lines(name, arm, mine)) if mine else []
    return "\n".join([*text, ""])


def lines(name: str, arm: Arm, mine: list[Row]) -> Iterator[str]:
    """An arm's line, and one for seeds that diverged."""
    ended = [row for row in mine if "diverged" in row]
    whole = [row for row in mine if "diverged" not in row]
    if whole:
        psnr = [row["psnr"] for row in whole]
        wide = interval(psnr)

        def mean(key: str) -> float:
            return statistics.fmean(row[key] for row in whole)

        yield (
            f"| {name} | {arm.about} | {mean('psnr'):.2f} dB | "
            f"{f'{wide:.2f}' if math.isfinite(wide) else '–'} | "
            f"{', '.join(f'{value:.1f}' for value in psnr)} | {mean('psnr_wrapper'):.2f} | "
            f"{mean('ceiling'):.1f} | "
            f"{mean('alignment'):.3f} of {mean('alignment_original'):.3f} | "
            f"{mean('retention'):.3f} of {mean('retention_original'):.3f} | "
            f"{mean('leakage'):.1%} | {mean('forwards'):,.0f} | {mean('cpu_seconds'):.0f} |"
        )
    for row in ended:
        yield f"| {name} | seed {row['seed']}: {row['diverged']} |" + " |" * 10
