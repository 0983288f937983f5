"""When to stop: the rule behind `steps = "auto"`.

    S_i = mean(log D of readings i - w + 1 … i)       D drift, a reading every `every` steps, w = 3
    fall_i = S_{i-w} - S_i                            of the smoothed drift, two windows apart
    plateau at i:  fall_j < bound for j = i - 1, i

From the plateau on the rate goes down to 0 within `share` of the steps done till then, in the
shape of the recipe's schedule; a constant schedule ends at the plateau. The cool-down begins in
time for its end to lie within `most`. All of it is a function of the readings, so a run that is
resumed with the readings it had decides as if it had never stopped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from recast.train.schedules import SCHEDULES

WINDOW = 3  # readings
BOUND = 0.15  # of the fall of log drift over a window
IN_A_ROW = 2
SHARE = 0.5  # of the steps before the cool-down that it takes itself


def falls(drifts: Sequence[float]) -> list[float]:
    """How far the smoothed log drift fell, for every reading with two windows before it."""
    logs = [math.log(max(d, 1e-12)) if math.isfinite(d) else math.inf for d in drifts]
    means = [sum(logs[k : k + WINDOW]) / WINDOW for k in range(len(logs) - WINDOW + 1)]
    return [means[k] - means[k + WINDOW] for k in range(len(means) - WINDOW)]


def level(drifts: Sequence[float]) -> bool:
    """Whether the drift has stopped falling at its last reading."""
    found = falls(drifts)[-IN_A_ROW:]
    return len(found) == IN_A_ROW and all(fall < BOUND for fall in found)


@dataclass(frozen=True)
class Pace:
    """The rule for a run of `most` steps at most, read every `every` steps after `warmup`."""

    most: int
    every: int
    schedule: str
    warmup: int = 0

    @property
    def share(self) -> float:
        return 0.0 if self.schedule == "constant" else SHARE

    def began(self, readings: Sequence[tuple[int, float]]) -> int | None:
        """The step at which the cool-down began; `readings` are (step, drift), oldest first."""
        steps = [step for step, _ in readings]
        drifts = [drift for _, drift in readings]
        for k, step in enumerate(steps):
            if self.cooled(step + self.every) > self.most or level(drifts[: k + 1]):
                return step
        return None

    def cooled(self, began: int) -> int:
        """The last step of a run whose cool-down begins after step `began`."""
        return began + math.ceil(self.share * began)

    def end(self, began: int | None) -> int:
        """The last step, as far as it is known."""
        return self.most if began is None else min(self.most, self.cooled(began))

    def factor(self, done: int, began: int | None) -> float:
        """The factor of the learning rate after `done` steps."""
        if began is None or done < began:
            return min(1.0, (done + 1) / self.warmup) if self.warmup else 1.0
        length = max(1, self.end(began) - began)
        return SCHEDULES[self.schedule](length)(done - began)
