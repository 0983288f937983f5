"""Learning rate schedules: plain functions from the number of steps done to a factor.

The loop sets the rate anew at every step, so that a resumed run needs no scheduler state. With p
the share of the steps that are done,

    linear      1 - p               cosine     (1 + cos(2 pi cycles p)) / 2
    polynomial  (1 - p)^power       restarts   (1 + cos(pi (cycles p mod 1))) / 2
    rex         (1 - p) / (1 - p / 2)
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


def restarts(total: int, cycles: float = 1.0) -> Schedule:
    """Down to 0 along half a cosine, `cycles` times (Loshchilov & Hutter 2017, SGDR, T_mult 1)."""

    def factor(done: int) -> float:
        p = done / total
        return 0.5 * (1 + math.cos(math.pi * (cycles * p % 1.0))) if p < 1 else 0.0

    return factor


def polynomial(total: int, power: float = 1.0) -> Schedule:
    """A power of what is left to do."""
    return lambda done: max(0.0, 1 - done / total) ** power


def rex(total: int) -> Schedule:
    """High for longer than `linear`, steep at the end (Chen et al. 2021, REX, section 3)."""

    def factor(done: int) -> float:
        left = max(0.0, 1 - done / total)
        return left / (0.5 + 0.5 * left)

    return factor


def warmup(schedule: Schedule, steps: int) -> Schedule:
    """Rise from 1/steps to 1 within the first `steps` steps; `schedule` then starts at its 0."""
    return lambda done: (done + 1) / steps if done < steps else schedule(done - steps)


def above(schedule: Schedule, floor: float) -> Schedule:
    """The same shape, from 1 down to `floor` instead of 0."""
    return lambda done: floor + (1 - floor) * schedule(done)


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "cosine-restarts": restarts,
    "polynomial": polynomial,
    "rex": rex,
}


def schedule_of(
    name: str,
    total: int,
    *,
    cycles: float = 0.0,
    power: float = 1.0,
    floor: float = 0.0,
    rise: int = 0,
) -> Schedule:
    """A schedule of `total` steps, `rise` of them warm-up; `cycles` 0 takes the schedule's own.

    A floor of a constant schedule, and arguments that a schedule does not have, act nowhere.
    """
    options: dict[str, float] = {}
    if name in ("cosine", "cosine-restarts") and cycles:
        options["cycles"] = cycles
    if name == "polynomial":
        options["power"] = power
    plain = SCHEDULES[name](max(1, total - rise), **options)
    shaped = above(plain, floor) if floor else plain
    return warmup(shaped, rise) if rise else shaped
