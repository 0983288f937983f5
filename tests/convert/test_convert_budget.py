"""Rounds through the images as steps, against counting them batch by batch."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from recast.convert.budget import check, settled, steps_in
from recast.data.batches import Plan, epoch, plan
from recast.errors import Refused
from recast.recipe import Recipe, load, override

PLANS = {
    "one bucket": plan(["a"] * 10),
    "buckets": plan(["a"] * 7 + ["b"] * 5 + ["c"]),
    "repeats": plan(["a", "b", "a"], [3, 10, 2]),
}


def material(source: Plan, mixed: bool = False) -> SimpleNamespace:
    images = SimpleNamespace(dataset=SimpleNamespace(plan=source))
    return SimpleNamespace(images=images) if mixed else images


def recipe(**train: object) -> Recipe:
    return override(load("train"), train=train)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", PLANS)
def test_rounds_are_counted_as_the_batches_go(name: str, batch: int, accumulate: int) -> None:
    source = PLANS[name]
    how = recipe(batch=batch, accumulate=accumulate)
    for rounds in (1, 2, 5):
        batches = 0
        while epoch(source, batches, batch) < rounds:
            batches += 1
        assert steps_in(material(source), how, rounds) == max(1, math.ceil(batches / accumulate))
    assert steps_in(material(source), how, 0.5) == max(
        1, math.ceil(len(source) / 2 / batch / accumulate)
    )


def test_in_a_mix_rounds_take_longer() -> None:
    how = override(recipe(batch=1), data={"source": "mix", "mix_share": 0.25})
    assert steps_in(material(PLANS["one bucket"], mixed=True), how, 2) == 80


def test_bounds_meet_the_steps_and_the_schedule_knows() -> None:
    source = material(PLANS["one bucket"])
    assert settled(recipe(batch=1, steps=1000, max_epochs=3), source).train.steps == 30
    assert settled(recipe(batch=1, steps=20, max_epochs=3), source).train.steps == 20
    assert settled(recipe(batch=1, steps=99, max_epochs=3, min_steps=50), source).train.steps == 50
    assert settled(recipe(batch=2, warmup_epochs=1.0), source).train.warmup == 5
    auto = settled(recipe(batch=1, steps="auto", max_steps=2000, max_epochs=4), source).train
    assert (auto.steps, auto.max_steps) == ("auto", 40)
    untouched = recipe(batch=1)
    assert settled(untouched, source) is untouched


def test_rounds_without_images_are_refused() -> None:
    with pytest.raises(Refused, match="warmup_epochs counts rounds through images"):
        check(recipe(warmup_epochs=1.0), images=False)
    check(recipe(max_epochs=1), images=True)
    with pytest.raises(Refused, match="give steps"):
        steps_in(SimpleNamespace(), recipe(), 1)
