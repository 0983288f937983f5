"""Schedules against the library whose names they bear, and by what they are for."""

import math

import pytest
import torch
from diffusers import optimization

from recast.train.schedules import SCHEDULES, schedule_of

TOTAL, RISE = 40, 5


@pytest.mark.parametrize(
    ("name", "theirs", "options", "ours"),
    [
        ("constant", "constant_with_warmup", {}, {}),
        ("linear", "linear", {}, {}),
        ("cosine", "cosine", {}, {}),
        ("cosine", "cosine", {"num_cycles": 0.375}, {"cycles": 0.375}),
        ("cosine-restarts", "cosine_with_restarts", {"num_cycles": 3}, {"cycles": 3.0}),
        ("polynomial", "polynomial", {"power": 2.0}, {"power": 2.0}),
    ],
)
def test_schedules_are_the_library_s(name: str, theirs: str, options: dict, ours: dict) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], 1.0)
    make = optimization.TYPE_TO_SCHEDULER_FUNCTION[optimization.SchedulerType(theirs)]
    span = {} if name == "constant" else {"num_training_steps": TOTAL}
    theirs_at = make(optimizer, num_warmup_steps=RISE, **span, **options)
    mine = schedule_of(name, TOTAL, rise=RISE, **ours)
    shown = []
    for _ in range(TOTAL):
        shown.append(theirs_at.get_last_lr()[0])
        optimizer.step()
        theirs_at.step()
    # our warm-up begins with 1/5, theirs with 0, which trains nothing
    assert [mine(k) for k in range(RISE)] == [(k + 1) / RISE for k in range(RISE)]
    found = [mine(k) for k in range(RISE, TOTAL)]
    assert found == pytest.approx(shown[RISE:], abs=2e-7)  # polynomial's own end is 1e-7


def test_the_published_cosine_ends_at_an_eighth_of_a_turn_before_its_bottom() -> None:
    end = schedule_of("cosine", 80, cycles=0.375)(80)
    assert end == pytest.approx(0.5 * (1 + math.cos(0.75 * math.pi)))
    assert schedule_of("cosine", 80)(80) == pytest.approx(0.0)


def test_rex_is_its_formula_and_stays_above_linear() -> None:
    rex = schedule_of("rex", 10)
    assert [rex(k) for k in (0, 5, 10, 11)] == pytest.approx([1.0, 2 / 3, 0.0, 0.0])
    assert all(rex(k) > SCHEDULES["linear"](10)(k) for k in range(1, 10))


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_floor_is_where_it_ends(name: str) -> None:
    held = schedule_of(name, 10, floor=0.2)
    assert held(0) == pytest.approx(1.0)
    assert held(10) == pytest.approx(1.0 if name == "constant" else 0.2)
