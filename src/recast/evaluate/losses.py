"""The training log as a table: mean loss per noise level over the course of a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from recast.evaluate.values import Losses

Row = tuple[int, Sequence[float], Sequence[float]]
"""(step, losses of its samples, their times in [0, 1])."""


def losses_by_level(rows: Iterable[Row], *, levels: int = 10, stretches: int = 40) -> Losses | None:
    """Average the samples of each noise level over even stretches of the run; None without rows.

    Losses that are not finite are left out, as the steps they belong to were.
    """
    log = sorted(rows, key=lambda row: row[0])
    if not log:
        return None
    first, last = log[0][0], log[-1][0]
    count = min(stretches, last - first + 1)
    edges = [first + (last - first + 1) * k // count for k in range(count + 1)]
    sums = [[0.0] * count for _ in range(levels)]
    counts = [[0] * count for _ in range(levels)]
    stretch = 0
    for step, losses, times in log:
        while step >= edges[stretch + 1]:
            stretch += 1
        for loss, t in zip(losses, times, strict=True):
            if loss - loss == 0:
                level = min(int(t * levels), levels - 1)
                sums[level][stretch] += loss
                counts[level][stretch] += 1
    values = tuple(
        tuple(s / n if n else None for s, n in zip(total, number, strict=True))
        for total, number in zip(sums, counts, strict=True)
    )
    return Losses(tuple(end - 1 for _, end in pairwise(edges)), values)
