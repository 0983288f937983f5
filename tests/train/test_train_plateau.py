"""When an open run ends: after the drift has stopped falling, at rate 0, within its bound."""

import math

import pytest

from recast.train.plateau import BOUND, IN_A_ROW, SHARE, WINDOW, Pace, falls, level


def curve(steps: int, *, floor: float, every: int = 10, rate: float = 30.0) -> list:
    """Readings (step, drift) of a drift that falls to `floor`."""
    return [(s, floor + math.exp(-s / rate)) for s in range(every, steps + 1, every)]


def run(pace: Pace, drift: list) -> tuple[int | None, int]:
    """(when the cool-down began, the last step), the readings made one after the other."""
    seen: list = []
    for reading in drift:
        seen.append(reading)
        if reading[0] >= pace.end(pace.began(seen)):
            break
    return pace.began(seen), seen[-1][0]


def test_the_fall_is_of_the_mean_log_over_two_windows() -> None:
    drifts = [math.exp(-0.5 * k) for k in range(2 * WINDOW)]
    assert falls(drifts) == pytest.approx([0.5 * WINDOW])
    assert falls(drifts[:-1]) == []


def test_a_drift_is_level_after_two_small_falls() -> None:
    falling = [math.exp(-2 * BOUND / WINDOW * k) for k in range(20)]
    assert not level(falling)
    still = [1.0] * (2 * WINDOW + IN_A_ROW - 1)
    assert level(still)
    assert not level(still[:-1])
    assert not level([*still[:-1], 0.1])


def test_a_drift_that_is_no_number_never_looks_level_for_being_one() -> None:
    assert not level([1.0] * WINDOW + [math.nan] + [0.01] * WINDOW)


def test_the_run_ends_a_fixed_share_after_the_plateau() -> None:
    pace = Pace(most=1000, every=10, schedule="linear")
    began, last = run(pace, curve(1000, floor=0.05))
    assert began is not None
    assert 100 <= began <= 300
    assert pace.end(began) == began + math.ceil(SHARE * began)
    assert last - pace.end(began) < pace.every


def test_the_rate_is_constant_and_then_falls_to_nothing() -> None:
    pace = Pace(most=1000, every=10, schedule="linear", warmup=4)
    assert [pace.factor(k, None) for k in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    rates = [pace.factor(k, 100) for k in range(90, 150)]
    assert rates[:11] == [1.0] * 11
    assert rates[11:] == pytest.approx([1 - k / 50 for k in range(1, 50)])
    assert pace.end(100) == 150


def test_a_run_that_never_settles_is_cooled_down_within_its_bound() -> None:
    pace = Pace(most=300, every=10, schedule="linear")
    began, _ = run(pace, curve(400, floor=0.0, rate=60))
    assert began is not None
    assert pace.cooled(began) <= 300 < pace.cooled(began + 10)


def test_a_constant_schedule_ends_at_the_plateau() -> None:
    pace = Pace(most=1000, every=10, schedule="constant")
    began, last = run(pace, curve(1000, floor=0.05))
    assert began == last == pace.end(began)


def test_a_decision_stays_as_more_readings_come() -> None:
    pace = Pace(most=1000, every=10, schedule="linear")
    drift = curve(1000, floor=0.05)
    decided = [pace.began(drift[:k]) for k in range(1, len(drift))]
    first = next(k for k, began in enumerate(decided) if began is not None)
    assert set(decided[first:]) == {decided[first]}
