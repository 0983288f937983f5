"""Learning rate schedules: plain functions from the number of steps done to a factor.

The loop sets the rate anew at every step, so that a resumed run needs no scheduler state.
"""

import math
from collections.abc import Callable

Schedule = Callable[[int], float]


def constant(total: int) -> Schedule:
    """The rate as given, at every step."""
    return lambda done: 1.0


def linear(total: int) -> Schedule:
    """From the rate down to 0, which would be reached after `total` steps."""
    return lambda done: max(0.0, 1 - done / total)


def cosine(total: int, cycles: float = 0.5) -> Schedule:
    """Cosine from 1 (half a cycle ends at 0), as in the Hugging Face schedule of that name."""
    turn = 2 * math.pi * cycles
    return lambda done: 0.5 * (1 + math.cos(turn * min(1.0, done / total)))


def warmup(schedule: Schedule, steps: int) -> Schedule:
    """Rise from 1/steps to 1 within the first `steps` steps; `schedule` then starts at its 0."""
    return lambda done: (done + 1) / steps if done < steps else schedule(done - steps)


SCHEDULES: dict[str, Callable[[int], Schedule]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
}
