"""What the conversion must show, read off the rows of bench/convert.

Differences of two arms are means over seeds with Welch's 95 % interval.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from _page import STUDENT

Row = dict[str, Any]
RECIPES = ("recipe-25", "recipe-50", "recipe-100", "recipe-200", "recipe")
SHORT = ("images-soon", "images-short", "default-soon", "default-eighth", "default-equal")
RATES = ("everything-0.0002", "everything-0.0005", "everything-0.001")
DIRECTIONS = {
    "eps to v-zsnr": "v-zsnr",
    "v-zsnr to eps": "v-zsnr-to-eps",
    "v to flow": "v-to-flow",
    "flow to eps": "flow-to-eps",
}
NONE = "not run"


def claims(rows: Sequence[Row], families: Sequence[str]) -> Iterator[str]:
    """The table, a column for each family."""
    yield "| figure | wanted | " + " | ".join(families) + " |"
    yield "|---|---|" + "---|" * len(families)
    for name, wanted, figure in FIGURES:
        found = [figure(Arms(rows, family)) or NONE for family in families]
        yield f"| {name} | {wanted} | " + " | ".join(found) + " |"


class Arms:
    """The rows of one family by arm."""

    def __init__(self, rows: Sequence[Row], family: str) -> None:
        self.rows = [row for row in rows if row["arm"].startswith(f"{family}/")]

    def values(self, arm: str, key: str) -> list[float]:
        """A figure of every seed that did not diverge."""
        mine = [row for row in self.rows if row["arm"].partition("/")[2] == arm]
        return [row[key] for row in mine if key in row]

    def mean(self, arm: str, key: str) -> float:
        """Mean over seeds; not a number where there are none."""
        found = self.values(arm, key)
        return statistics.fmean(found) if found else math.nan


def spread(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Difference of two means and half of its 95 % interval (Welch); infinite for one seed."""
    apart = statistics.fmean(first) - statistics.fmean(second)
    if len(first) < 2 or len(second) < 2:
        return apart, math.inf
    parts = [statistics.variance(values) / len(values) for values in (first, second)]
    if not sum(parts):
        return apart, 0.0
    below = sum(
        part**2 / (len(values) - 1) for part, values in zip(parts, (first, second), strict=True)
    )
    freedom = max(1, min(len(STUDENT), int(sum(parts) ** 2 / below)))
    return apart, STUDENT[freedom - 1] * math.sqrt(sum(parts))


def told(apart: float, wide: float, unit: str = "dB") -> str:
    """A difference and its interval."""
    reach = f" ({apart - wide:+.2f} to {apart + wide:+.2f})" if math.isfinite(wide) else " (1 seed)"
    return f"{apart:+.2f} {unit}{reach}"


def cheaper(arms: Arms) -> str | None:
    """The recipe's best budget against the cheapest default that reaches it."""
    budgets = [name for name in RECIPES if arms.values(name, "psnr")]
    short = [name for name in SHORT if arms.values(name, "psnr")]
    if not budgets or not short:
        return None
    # the best of single seeds is mostly the luckiest
    most = max(len(arms.values(name, "psnr")) for name in budgets)
    sure = [name for name in budgets if len(arms.values(name, "psnr")) >= most - 1]
    best = max(sure, key=lambda name: arms.mean(name, "psnr"))
    goal = arms.mean(best, "psnr")
    reached = [name for name in short if arms.mean(name, "psnr") >= goal]
    if not reached:
        return f"{goal:.2f} dB of {best} not reached by {', '.join(short)}"
    name = min(reached, key=lambda each: arms.mean(each, "forwards"))
    least = min(short, key=lambda each: arms.mean(each, "forwards"))

    def cost(arm: str) -> str:
        share = arms.mean(best, "forwards") / arms.mean(arm, "forwards")
        kept = f"{arms.mean(arm, 'alignment'):.3f} and {arms.mean(arm, 'retention'):.3f}"
        return f"{arm}: {arms.mean(arm, 'psnr'):.2f} dB for 1/{share:.1f}, concepts {kept}"

    found = [cost(each) for each in dict.fromkeys((least, name))]
    theirs = f"{arms.mean(best, 'alignment'):.3f} and {arms.mean(best, 'retention'):.3f}"
    return (
        f"{'; '.join(found)} ({best}: {goal:.2f} dB, concepts {theirs}; "
        f"{len(arms.values(best, 'psnr'))} seeds)"
    )


def equal(arms: Arms) -> str | None:
    """The default against the recipe, as many forwards each."""
    first, second = arms.values("default-equal", "psnr"), arms.values("recipe", "psnr")
    return told(*spread(first, second)) if first and second else None


def automatic(arms: Arms) -> str | None:
    """The automatic run against the exact wrapper's pictures."""
    found = arms.values("default", "psnr_wrapper")
    steps = arms.values("default", "steps")
    if not found:
        return None
    each = ", ".join(f"{value:.1f}" for value in found)
    return f"{statistics.fmean(found):.2f} dB ({each}), {statistics.fmean(steps):.0f} steps"


def everything(arms: Arms) -> str | None:
    """The read-out against all layers at their best rate, as many steps each."""
    tried = [name for name in RATES if arms.values(name, "psnr")]
    mine = arms.values("default-400", "psnr")
    if not tried or not mine:
        return None
    firsts = ", ".join(f"{arms.values(name, 'psnr')[0]:.1f}" for name in tried)
    # an interval needs seeds, which the rate that was expected to be best has
    best = max(tried, key=lambda name: (len(arms.values(name, "psnr")), arms.mean(name, "psnr")))
    apart = told(*spread(mine, arms.values(best, "psnr")))
    time = arms.mean("default-400", "cpu_seconds") / arms.mean(best, "cpu_seconds")
    held = arms.mean("default-400", "held_mb") / arms.mean(best, "held_mb")
    return (
        f"{apart} against {best} (its rates with seed 0: {firsts} dB); "
        f"time x {time:.2f}, memory of the step x {held:.2f}"
    )


def ratio(key: str, arm: str = "default", beside: str | None = "recipe") -> Any:
    """A share that the judge saw against the original's, the recipe's beside it."""

    def figure(arms: Arms) -> str | None:
        def of(name: str) -> float:
            return arms.mean(name, key) / arms.mean(name, f"{key}_original")

        if not arms.values(arm, key):
            return None
        other = f"; recipe {of(beside):.3f}" if beside and arms.values(beside, key) else ""
        return f"{of(arm):.3f}{other}"

    return figure


def marks(arms: Arms) -> str | None:
    """Watermarks in the pictures."""
    if not arms.values("default", "leakage"):
        return None
    return f"{arms.mean('default', 'leakage'):.2%}; recipe {arms.mean('recipe', 'leakage'):.1%}"


def direction(arm: str) -> Any:
    """PSNR to the model it came from, and the judge's figures against it."""

    def figure(arms: Arms) -> str | None:
        if not arms.values(arm, "psnr"):
            return None
        judged = (
            arms.mean(arm, key) / arms.mean(arm, f"{key}_original")
            for key in ("alignment", "retention")
        )
        kept = " and ".join(f"{value:.3f}" for value in judged)
        seeds = len(arms.values(arm, "psnr"))
        return f"{arms.mean(arm, 'psnr'):.2f} dB, judge {kept} ({seeds} seed{'s' * (seeds > 1)})"

    return figure


def larger(arms: Arms) -> str | None:
    """Drift at twice the side over that at the model's own, each of the answers' power there."""
    found = []
    for arm, about in (("default", "default"), ("dream-128", "dreams of twice the side")):
        if arms.values(arm, "drift_2x"):
            once, twice = arms.mean(arm, "drift_1x"), arms.mean(arm, "drift_2x")
            found.append(f"{about}: {twice:.4f} against {once:.4f}, x {twice / once:.2f}")
    return "; ".join(found) or None


FIGURES = (
    ("compute until the recipe's best fidelity is reached", "<= 1/8", cheaper),
    ("PSNR at equal compute, default - recipe", ">= 6 dB, interval above 4", equal),
    ("default (steps auto) against the exact wrapper", ">= 34 dB", automatic),
    ("read-out - everything at its best of three rates, 400 steps", "not worse", everything),
    ("retention of unseen concepts, of the original's", ">= .99", ratio("retention")),
    ("alignment with seen concepts, of the original's", "-", ratio("alignment")),
    ("watermarks, a third of the images marked", "<= 1 %", marks),
    *((name, ">= 30 dB, judge >= .98", direction(arm)) for name, arm in DIRECTIONS.items()),
    ("eps to flow and back, to the original", ">= 28 dB", direction("round-trip")),
    ("drift at twice the resolution", "<= x 1.2", larger),
)
