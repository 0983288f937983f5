"""The pictures of docs/ablation.md."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _distill_arms import ABOUT, ARMS, Arm
from _distill_verdict import WEIGHTS, against, errors

Row = dict[str, Any]
COLOURS = {
    "A0": "#7f7f7f", "A1": "#000000", "A2": "#d62728", "A3": "#ff9896", "A4": "#ff7f0e",
    "A5": "#1f77b4", "A6": "#2ca02c", "A7": "#98df8a", "A8": "#9467bd", "N1": "#8c564b",
    "A2-literal": "#e377c2",
}  # fmt: skip
BLOCKS = ["down_0", "down_1", "down_2", "mid", "up_0", "up_1", "up_2"]


def pictures(rows: Sequence[Row], folder: Path) -> None:
    """Draw what the rows allow."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update({"figure.dpi": 100, "font.size": 9, "axes.grid": True, "grid.alpha": 0.25})
    for name, draw in (("curves", curves), ("differences", differences), ("weights", over_time),
                       ("gain", gain), ("samples", samples)):  # fmt: skip
        figure = draw(rows)
        if figure is not None:
            figure.savefig(folder / f"ablation-{name}.png", bbox_inches="tight")


def curves(rows: Sequence[Row]) -> Any:
    """Held-out error over steps, means over seeds, and each arm's distance to A1."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 7), sharex=True, layout="constrained")
    for column, weight in enumerate(WEIGHTS):
        for arm in ARMS.values():
            seen = mean_curve(rows, arm.name)
            control = mean_curve(rows, Arm("A1", weight).name, like=arm.name)
            if arm.weight not in (weight, 0.0) or not seen:
                continue
            style = {"color": COLOURS[arm.kind], "label": f"{arm.kind} {ABOUT[arm.kind]}"}
            axes[0, column].plot(*zip(*seen, strict=True), **style)
            if control and arm.kind not in ("A1", "N1"):
                apart = [
                    (x, 100 * (y / z - 1)) for (x, y), (_, z) in zip(seen, control, strict=True)
                ]
                axes[1, column].plot(*zip(*apart, strict=True), **style)
        axes[0, column].set(title=f"block weight {weight:g}", ylabel="held-out error")
        axes[1, column].set(xlabel="step", ylabel="against A1, %")
        axes[1, column].axhline(0, color="black", linewidth=1)
    handles, labels = axes[0, 1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    return figure


def mean_curve(rows: Sequence[Row], name: str, like: str = "") -> list[tuple[float, float]]:
    """(step, mean error) of an arm over its seeds, or over those that another has `like`wise."""
    seeds = {row["seed"] for row in rows if row["arm"] == (like or name)}
    kept = [row for row in rows if row["arm"] == name and row["seed"] in seeds]
    mine = [row["curve"] for row in kept if "curve" in row]
    return [
        (points[0][0], statistics.fmean(point[1] for point in points))
        for points in zip(*mine, strict=True)
    ]


def differences(rows: Sequence[Row]) -> Any:
    """Each arm's error less A1's, in per cent of it: seeds, mean, 95 % interval."""
    from matplotlib import pyplot as plt

    found = errors(rows)
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True, layout="constrained")
    kinds = ["A0", "A2", "A3", "A4", "A5", "A6", "A7", "A8", "A2-literal"]
    for axis, weight in zip(axes, WEIGHTS, strict=True):
        control = Arm("A1", weight)
        for place, kind in enumerate(kinds):
            arm = Arm(kind, 0.0 if kind == "A0" else weight)
            seen = against(found, arm, control)
            if seen is None:
                continue
            scale = 100 / statistics.fmean(found[control.name].values())
            axis.plot(
                [scale * d for d in seen.deltas], [place] * len(seen.deltas), "o", alpha=0.35,
                color=COLOURS[kind], markersize=4,
            )  # fmt: skip
            half = scale * (seen.high - seen.low) / 2
            axis.errorbar(
                scale * seen.mean, place, xerr=half, fmt="D", color=COLOURS[kind], capsize=4,
                markersize=5,
            )  # fmt: skip
        axis.axvline(0, color="black", linewidth=1)
        axis.set(title=f"block weight {weight:g}", xlabel="error against A1, % (left is better)")
        axis.set_yticks(range(len(kinds)), kinds)
    axes[0].set_ylim(len(kinds) - 0.5, -0.5)
    return figure


def over_time(rows: Sequence[Row]) -> Any:
    """Each block's weight over the steps, mean over seeds and its spread."""
    from matplotlib import pyplot as plt

    shown = ["A2-1", "A3-1", "A5-1", "A2-literal-1"]
    figure, axes = plt.subplots(1, 4, figsize=(12, 3.2), layout="constrained")
    for axis, name in zip(axes, shown, strict=True):
        mine = [row["weights"] for row in rows if row["arm"] == name]
        for block, label in enumerate(BLOCKS):
            at = [[point[1 + block] for point in points] for points in zip(*mine, strict=True)]
            steps = [points[0][0] for points in zip(*mine, strict=True)]
            middle = [statistics.fmean(values) for values in at]
            apart = [statistics.pstdev(values) for values in at]
            line = axis.plot(steps, middle, label=label)[0]
            axis.fill_between(
                steps,
                [m - a for m, a in zip(middle, apart, strict=True)],
                [m + a for m, a in zip(middle, apart, strict=True)],
                color=line.get_color(), alpha=0.15, linewidth=0,
            )  # fmt: skip
        axis.set(title=name if mine else f"{name}: no rows yet", xlabel="step")
    axes[0].set_ylabel("weight, mean of 10 steps")
    axes[0].legend(fontsize=7, ncols=2)
    return figure


def gain(rows: Sequence[Row]) -> Any:
    """Every block and bin: the gain from more weight over e_t and over KD."""
    from matplotlib import pyplot as plt

    mine = [row for row in rows if "gain" in row and row["arm"] == "gain-1"]
    if not mine:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for axis, key, label in ((axes[0], "e_t", "e_t, nats"), (axes[1], "kd_bins", "KD")):
        for block, name in enumerate(BLOCKS):
            cells = [averaged(mine, part, block) for part in (key, "gain")]
            axis.plot(*cells, "o", markersize=4, alpha=0.7, label=name)
        axis.axhline(0, color="black", linewidth=1)
        axis.set(xlabel=f"{label} at half of the run", xscale="symlog" if key == "e_t" else "log")
    axes[0].set_ylabel("gain in held-out error")
    axes[1].legend(fontsize=7)
    return figure


def averaged(rows: Sequence[Row], key: str, block: int) -> list[float]:
    """A block's row of a table, mean over seeds."""
    return [statistics.fmean(values) for values in zip(*(r[key][block] for r in rows), strict=True)]


def samples(rows: Sequence[Row]) -> Any:
    """Pictures of the same noise and scenes by each student of seed 0; None without them."""
    from _distill_reference import kept_samples
    from matplotlib import pyplot as plt

    found = kept_samples()
    if not found:
        return None
    figure, axes = plt.subplots(
        len(found), 10, figsize=(10, 1.02 * len(found)), layout="constrained"
    )
    for line, (name, images) in zip(axes, found.items(), strict=True):
        for axis, image in zip(line, images, strict=False):
            axis.imshow((image.permute(1, 2, 0).numpy() + 1) / 2)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    return figure
