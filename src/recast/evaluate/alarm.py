"""The collapse alarm: figures of a run that leave the bands they had at its start.

    teacher drift                       0 … max(2 D, P / 4)
    total variation, colour entropy,
    spectrum slope of decoded x0-hats   what the teacher and the start span, and a margin

The start is the untrained network until three readings are in, then those three: D is the largest
drift among them, P the mean square of the teacher's answers. A conversion begins far from the
teacher and comes nearer, so its figures move inside the first band and stay inside the second.
A run is lost after two readings in a row with a figure outside; at its last step one is enough.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from recast.evaluate.validation import NAMES, Fixed, Reading

START = 3  # readings that make the second band
PATIENCE = 2  # readings in a row outside
GROWTH = 2.0  # of the drift, against the start's largest
SHARE = 0.25  # of the teacher's power that a drift may always have
DRIFT = "teacher drift"
# total variation by a factor, entropy in bits, slope
MARGINS = ((2.0, "factor"), (1.0, "plus"), (0.75, "plus"))


@dataclass(frozen=True)
class Left:
    """A figure that left its band."""

    name: str
    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.name} {self.value:.4g}, outside {self.low:.4g} to {self.high:.4g}"


def bands(readings: Sequence[Reading], fixed: Fixed) -> dict[str, tuple[float, float]]:
    """The bands that the next reading is held against; `readings[0]` is the untrained network."""
    early = readings[1 : START + 1] if len(readings) > START else readings[:1]
    grown = GROWTH * max((r.drift for r in early if math.isfinite(r.drift)), default=0.0)
    found = {DRIFT: (0.0, max(grown, SHARE * fixed.power))}
    for k, (name, (margin, kind)) in enumerate(zip(NAMES, MARGINS, strict=True)):
        spanned = [fixed.figures[k].item(), *(r.figures[k] for r in early)]
        spanned = [value for value in spanned if math.isfinite(value)]
        low, high = min(spanned), max(spanned)
        found[name] = (
            (low / margin, high * margin) if kind == "factor" else (low - margin, high + margin)
        )
    return found


def left(reading: Reading, held: dict[str, tuple[float, float]]) -> tuple[Left, ...]:
    """The figures of a reading outside their bands; what is not a number is outside of any."""
    values = {DRIFT: reading.drift, **reading.named}
    return tuple(
        Left(name, value, *held[name])
        for name, value in values.items()
        if not held[name][0] <= value <= held[name][1]
    )


def outside(readings: Sequence[Reading], fixed: Fixed) -> list[tuple[Left, ...]]:
    """For every reading but the untrained one, which figures were outside when it was made."""
    return [
        left(reading, bands(readings[:k], fixed)) for k, reading in enumerate(readings) if k > 0
    ]


def lost(readings: Sequence[Reading], fixed: Fixed, *, last: bool) -> tuple[Left, ...]:
    """The figures that make the run lost now; empty where it is not."""
    found = outside(readings, fixed)
    need = 1 if last else PATIENCE
    return found[-1] if len(found) >= need and all(found[-need:]) else ()


def good(readings: Sequence[Reading], fixed: Fixed) -> int:
    """The step of the newest reading with every figure inside; 0 where there is none."""
    found = outside(readings, fixed)
    inside = [r.step for r, gone in zip(readings[1:], found, strict=True) if not gone]
    return max(inside, default=0)
