"""How far weights have moved, block by block, while they were trained: sums, shares, a picture.

|dW|_b = sqrt(sum over the layers of block b of |W_t - W_0|^2)          Frobenius
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence

ORDER = ("TE1", "TE2", "TIME", "LABEL", "IN", "MID", "OUT")
INNER = ("EMB", "L", "NORM", "PROJ")  # of a text encoder


def by_block(squares: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Norms of blocks from (block, squared norm) of their layers, in the network's order."""
    sums: dict[str, float] = {}
    for block, square in squares:
        sums[block] = sums.get(block, 0.0) + square
    return {block: math.sqrt(sums[block]) for block in sorted(sums, key=place)}


def place(block: str) -> tuple[int, int, int]:
    """Where a block (IN04, MID1, OUT08, TE2.L31, TIME) comes among the others; OUT is the last."""
    head, _, inner = block.partition(".")
    name = (inner or head).rstrip("0123456789")
    number = (inner or head)[len(name) :]
    later = INNER.index(name) if inner else int(block == "OUT")
    return ORDER.index(head if inner else name), later, int(number or -1)


def change_png(
    steps: Sequence[int], norms: Mapping[str, Sequence[float]], *, title: str = ""
) -> bytes:
    """Draw norms of blocks over steps: a row a block, darker where it moved further, and the sum.

    Every block has as many norms as there are steps. The scale is logarithmic, over the three
    decades below the largest norm.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    blocks = list(norms)
    most = max((value for row in norms.values() for value in row), default=0.0) or 1.0
    figure = Figure(figsize=(7.0, 1.9 + 0.19 * len(blocks)), layout="constrained", dpi=110)
    above, below = figure.subplots(2, 1, height_ratios=(1.4, 0.19 * len(blocks) + 0.3))
    total = [math.hypot(*(row[k] for row in norms.values())) for k in range(len(steps))]
    above.plot(range(len(steps)), total, color="#222222", marker="." if len(steps) < 40 else "")
    above.set_ylabel("all blocks")
    above.set_ylim(bottom=0)
    above.set_xlim(-0.5, len(steps) - 0.5)
    above.set_title(title or "Change of the weights (Frobenius norm)", loc="left", fontsize=10)
    rows = [[max(value, most * 1e-3) for value in norms[block]] for block in blocks]
    shades = LogNorm(most * 1e-3, most)
    image = below.imshow(rows, aspect="auto", cmap="magma_r", norm=shades, interpolation="nearest")
    below.set_yticks(range(len(blocks)), blocks, fontsize=7)
    shown = sorted({round(k * (len(steps) - 1) / 7) for k in range(8)})
    for axes in (above, below):
        axes.set_xticks(shown, [str(steps[k]) for k in shown])
    below.set_xlabel("step")
    figure.colorbar(image, ax=below, label="|dW| of a block", pad=0.01)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
