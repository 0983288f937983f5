"""What the rows of bench/distill say, in words; every word is computed from the rows.

A claim for the assessor needs eight seeds and A2 below the control A1, the placebo A3 and the
frozen weights A4: each 95 % t interval below 0 and each sign-flip p below .05 after Holm's
correction over these three. Beating A1 alone is no claim.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from _distill_arms import SEEDS, Arm
from _distill_stats import LEVEL, Paired, holm, paired

Row = dict[str, Any]
Errors = Mapping[str, Mapping[int, float]]
RIVALS = {"A1": "the control", "A3": "the placebo", "A4": "its own mean weights, frozen"}
OTHERS = {
    "A5": "learned weights",
    "A7": "loss-aware times",
    "A6": "the assessor's times",
    "A8": "both uses of the assessor",
}
WEIGHTS = (0.05, 1.0)


def errors(rows: Sequence[Row]) -> dict[str, dict[int, float]]:
    """The primary figure by arm and seed; a run that diverged counts as infinite."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if "error" in row:
            value = math.inf if row["diverged"] else row["error"]
            found.setdefault(row["arm"], {})[row["seed"]] = value
    return found


def against(found: Errors, arm: Arm, other: Arm) -> Paired | None:
    """One arm minus another, over the seeds that both have; None where one diverged."""
    pairs = (found.get(arm.name, {}), found.get(other.name, {}))
    if any(math.isinf(value) for each in pairs for value in each.values()):
        return None
    return paired(*pairs)


def verdict(found: Errors, weight: float) -> str:
    """One of: helps, helps but not by what it knows, harms, no difference, not decided."""
    treatment = Arm("A2", weight)
    seen = {kind: against(found, treatment, Arm(kind, weight)) for kind in RIVALS}
    if any(each is None or len(each.deltas) < SEEDS for each in seen.values()):
        count = min((len(each.deltas) if each else 0) for each in seen.values())
        return f"Not decided: {count} of {SEEDS} seeds are there."
    known: dict[str, Paired] = {kind: each for kind, each in seen.items() if each is not None}
    p = holm({kind: each.p for kind, each in known.items()})
    control = statistics.fmean(found[Arm("A1", weight).name].values())
    beaten = [kind for kind, each in known.items() if each.high < 0 and p[kind] < LEVEL]
    lost = [kind for kind, each in known.items() if each.low > 0 and p[kind] < LEVEL]
    size = known["A1"].mean / control
    least = known["A1"].detectable / control
    if len(beaten) == len(RIVALS):
        return (
            f"The assessor helps here: A2's error is {-size:.2%} below the control's, and below the"
            " placebo's and the frozen weights', too."
        )
    if "A1" in beaten:
        others = " and ".join(RIVALS[kind] for kind in RIVALS if kind not in beaten)
        return (
            f"No claim: A2's error is {-size:.2%} below the control's, but not below that of "
            f"{others}; what helps is not what the assessor knows."
        )
    if "A1" in lost:
        above = " and ".join(RIVALS[kind] for kind in lost)
        alike = [RIVALS[kind] for kind in RIVALS if kind not in lost]
        rest = f"; it cannot be told from {' and '.join(alike)}" if alike else ""
        return (
            f"The assessor harms here: A2's error is {size:.2%} above the control's "
            f"({interval(known['A1'], control)}), so it lies above {above}{rest}."
        )
    return (
        f"No difference detected: A2's error is {abs(size):.2%} {'below' if size < 0 else 'above'} "
        f"the control's ({interval(known['A1'], control)}); {least:.2%} would have been seen four "
        "times in five."
    )


def interval(found: Paired, scale: float) -> str:
    """A 95 % t interval as a share of `scale`."""
    return f"{found.low / scale:+.2%} to {found.high / scale:+.2%}"


def besides(found: Errors) -> list[str]:
    """What else the rows answer, a sentence each."""
    said = []
    for weight in WEIGHTS:
        control = Arm("A1", weight)
        there = found.get(control.name, {})
        if not there:
            continue
        scale = statistics.fmean(there.values())
        head = f"Weight {weight:g}:"
        seen = against(found, Arm("A0", 0.0), control)
        if seen:
            word = _word(seen, "raises", "lowers")
            said.append(
                f"{head} leaving the block term out {word} the control's error "
                f"({seen.mean / scale:+.2%}, {interval(seen, scale)}, p {seen.p:.3f})."
            )
        for kind, name in OTHERS.items():
            seen = against(found, Arm(kind, weight), control)
            if seen:
                word = _word(seen, "raise", "lower")
                said.append(
                    f"{head} {name} {word} the control's error ({seen.mean / scale:+.2%}, "
                    f"{interval(seen, scale)}, p {seen.p:.3f})."
                )
        seen_error = found.get(Arm("N1", weight).name, {})
        finite = [value for value in seen_error.values() if math.isfinite(value)]
        if seen_error:
            times = f"{statistics.fmean(finite) / scale:.1f} times" if finite else "beyond"
            said.append(
                f"{head} trained on pure noise (N1) a student ends at {times} the control's error."
            )
    return said


def _word(seen: Paired, more: str, less: str) -> str:
    """The verb of a difference: only one that its interval and p carry."""
    if len(seen.deltas) < SEEDS:
        return f"(only {len(seen.deltas)} of {SEEDS} seeds, not decided) {more} or {less}"
    if seen.p >= LEVEL or seen.low <= 0 <= seen.high:
        return f"neither {more} nor {less} detectably"
    return more if seen.mean > 0 else less
