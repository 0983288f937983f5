"""Charts as inline SVG: matplotlib draws them, the page's style sheet colours them.

Lines are drawn in stand-in colours that are then replaced by CSS variables, so one chart serves
light and dark pages; text stays text. What matplotlib adds of links and metadata is cut off.
"""

from __future__ import annotations

import io
import math
import re
from typing import Any

from recast.evaluate.values import Course, Drift, Losses, Null

INK, MUTED, GRID, FIRST, SECOND, THIRD = (
    "#0a0b01",
    "#0a0b02",
    "#0a0b03",
    "#0a0b04",
    "#0a0b05",
    "#0a0b06",
)
VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--line)",
    FIRST: "var(--accent)",
    SECOND: "var(--second)",
    THIRD: "var(--third)",
}
LADDER = tuple(f"#0a0c{k:02x}" for k in range(16))  # noise levels, from data to noise
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "recast",
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.8,
    "axes.axisbelow": True,
    "lines.solid_capstyle": "round",
}


def drift_chart(drift: Drift) -> str:
    """Mean squared error over noise levels, three lines; "" without levels."""
    levels = drift.levels
    if not levels:
        return ""

    def draw(axes: Any) -> None:
        t = [(level.low + level.high) / 2 for level in levels]
        lines = [
            ("original", "original, against the data", SECOND, {"linewidth": 6, "alpha": 0.4}),
            ("converted", "converted, against the data", FIRST, {}),
            ("against_original", "converted, against the original", THIRD, {}),
        ]
        for key, label, colour, style in lines:
            axes.plot(
                t, [getattr(level, key) for level in levels], color=colour, label=label, **style
            )
        reached = [level for level in levels if level.covered > 0]
        end = (
            reached[-1].low + (reached[-1].high - reached[-1].low) * reached[-1].covered
            if reached
            else 0
        )
        if end < 0.995:
            axes.axvspan(end, 1, color=GRID, alpha=0.45, linewidth=0)
        _scale(
            axes,
            [
                v
                for level in levels
                for v in (level.against_original, level.converted, level.original)
            ],
        )
        axes.set_xlim(0, 1)
        axes.set_xlabel("noise level t  (0 data, 1 noise)")
        axes.legend(
            frameon=False,
            loc="lower left",
            bbox_to_anchor=(-0.02, 1),
            labelcolor=INK,
            handlelength=1.6,
        )

    return _svg(draw, "drift")


def loss_chart(losses: Losses | None) -> str:
    """Loss over steps, one line per noise level; "" without a log."""
    if losses is None or not losses.steps:
        return ""

    def draw(axes: Any) -> None:
        count = len(losses.values)
        for k, values in enumerate(losses.values):
            points = [(s, v) for s, v in zip(losses.steps, values, strict=True) if v is not None]
            if not points:
                continue
            colour = LADDER[round(k * (len(LADDER) - 1) / max(count - 1, 1))]
            axes.plot(
                *zip(*points, strict=True),
                color=colour,
                linewidth=1.4,
                marker="o" if len(points) == 1 else "",
            )
        _scale(axes, [v for values in losses.values for v in values if v is not None])
        axes.set_xlabel("step")
        axes.margins(x=0.02)

    return _svg(draw, "loss")


def course_chart(course: Course | None) -> str:
    """Drift and data error of the validations over steps; "" without any."""
    if course is None:
        return ""

    def draw(axes: Any) -> None:
        lines = [
            (course.data, "against the data", FIRST),
            (course.drift, "against the original", THIRD),
        ]
        shown = []
        for values, label, colour in lines:
            points = [(s, v) for s, v in zip(course.steps, values, strict=True) if v is not None]
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, label=label, marker=".")
            shown += [value for _, value in points]
        _scale(axes, shown)
        axes.set_xlabel("step")
        axes.legend(frameon=False, loc="upper right", labelcolor=INK, handlelength=1.6)

    return _svg(draw, "course")


def null_chart(null: Null | None) -> str:
    """Distance between the empty prompt and zeros over noise levels, both models; "" without."""
    if null is None:
        return ""

    def draw(axes: Any) -> None:
        lines = [
            (null.original, "original", SECOND, {"linewidth": 6, "alpha": 0.4}),
            (null.converted, "converted", FIRST, {}),
        ]
        for levels, label, colour, style in lines:
            t = [(level.low + level.high) / 2 for level in levels]
            axes.plot(
                t, [100 * level.distance for level in levels], color=colour, label=label, **style
            )
        axes.set_xlim(0, 1)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
        axes.set_xlabel("noise level t  (0 data, 1 noise)")
        axes.legend(frameon=False, loc="best", labelcolor=INK, handlelength=1.6)

    return _svg(draw, "null")


def _scale(axes: Any, values: list[float]) -> None:
    """Logarithmic where every value is positive, with ticks at 1, 2, 5 written as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if values and min(values) > 0:
        axes.set_yscale("log")
        decades = math.log10(max(values) / min(values))
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if decades > 2 else (1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _svg(draw: Any, name: str) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(5.6, 3.7), layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.grid(axis="y")
        draw(axes)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return _inline(buffer.getvalue(), name)


def _inline(svg: str, name: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", svg)
    svg = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\1{name}-", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, variable)
    for k, colour in enumerate(LADDER):
        share = round(100 * k / (len(LADDER) - 1))
        svg = svg.replace(colour, f"color-mix(in oklab, var(--noise) {share}%, var(--data))")
    return svg.strip()
