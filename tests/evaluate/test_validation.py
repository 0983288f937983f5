"""The fixed set: made once, read back bit for bit, exact for the teacher itself."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from recast.evaluate.alarm import (
    DRIFT,
    GROWTH,
    PATIENCE,
    SHARE,
    START,
    bands,
    good,
    lost,
)  # fmt: skip
from recast.evaluate.validation import (
    BINS,
    LOOKED,
    NAMES,
    Fixed,
    Reading,
    fix,
    read,
    read_fixed,
    write_fixed,
)  # fmt: skip
from recast.objective import EPS, FLOW, Net, express
from recast.text.encode import Condition

CONDITION = Condition(torch.arange(6.0).view(2, 1, 3), torch.ones(2, 4))


def net(bound: Condition, *, off: float = 0.0) -> Net:
    """An eps network whose answer depends on everything it is told."""

    def answer(x: Tensor, t: Tensor) -> Tensor:
        told = bound.context.mean((1, 2)) / 10 + t
        return 0.9 * x + told.view(-1, 1, 1, 1).to(x) + off

    return answer


def teacher(bound: Condition) -> Net:
    return express(net(bound), EPS, FLOW)


def decode(x: Tensor) -> Tensor:
    return F.interpolate(x[:, :3], scale_factor=4) / 3


@pytest.fixture(scope="module")
def fixed() -> Fixed:
    x0 = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    return fix(teacher, EPS, FLOW, x0, CONDITION, decode, seed=3)


def test_every_tenth_of_the_path_is_visited_by_every_latent(fixed: Fixed) -> None:
    tenths = (fixed.t * BINS).long()
    assert tenths.tolist() == [k for k in range(BINS) for _ in range(2)]
    assert fixed.covered.tolist()[:18] == [1.0] * 18
    assert len(fixed) == len(fixed.answer) == len(fixed.eps) == 2 * BINS


def test_the_teacher_drifts_by_nothing_and_another_by_its_distance(fixed: Fixed) -> None:
    same = read(teacher, fixed, FLOW, decode, "cpu", 7)
    assert (same.step, same.drift) == (7, 0.0)
    assert same.figures == pytest.approx(fixed.figures.tolist())
    assert same.data > 0

    def moved(bound: Condition) -> Net:
        whole = teacher(bound)
        return lambda x, t: whole(x, t) + 0.1

    assert read(moved, fixed, FLOW, decode, "cpu", 0).drift == pytest.approx(0.01, rel=1e-4)


def test_the_error_against_the_data_is_that_of_x0_and_eps(fixed: Fixed) -> None:
    answers = iter(FLOW.target(fixed.data(slice(None)), fixed.eps, fixed.t).split(1000))
    perfect = read(lambda bound: lambda x, t: next(answers), fixed, FLOW, None, "cpu", 0)
    assert perfect.data == pytest.approx(0, abs=1e-12)
    assert perfect.figures == ()


def test_conditions_go_with_their_own_latents(fixed: Fixed) -> None:
    """With the second latent's condition changed, only rows of the second latent move."""
    other = replace(fixed, condition=CONDITION.to(torch.float32)[[0, 0]])
    found = fix(teacher, EPS, FLOW, fixed.x0, other.condition, decode, seed=3)
    apart = (found.answer - fixed.answer).flatten(1).abs().amax(1).view(BINS, 2)
    assert (apart[:, 0] == 0).all()
    assert (apart[:, 1] > 0).all()


def test_the_set_comes_back_from_disk_bit_for_bit(fixed: Fixed, tmp_path: Path) -> None:
    write_fixed(tmp_path / "fixed.safetensors", fixed, {"a": "b"})
    again = read_fixed(tmp_path / "fixed.safetensors")
    for name in ("x0", "eps", "t", "covered", "answer", "figures"):
        assert torch.equal(getattr(again, name), getattr(fixed, name)), name
    assert torch.equal(again.condition.context, fixed.condition.context)
    assert again.condition.time_ids is None
    ours, theirs = (read(net, each, FLOW, decode, "cpu", 1) for each in (fixed, again))
    assert ours == theirs


def test_answers_that_are_no_numbers_have_no_figures(fixed: Fixed) -> None:
    broken = read(lambda bound: lambda x, t: x * torch.nan, fixed, FLOW, decode, "cpu", 1)
    assert all(value != value for value in (broken.drift, *broken.figures))
    assert len(broken.figures) == len(NAMES)
    assert LOOKED < BINS


# the alarm


def reading(step: int, drift: float, figures: tuple[float, ...] | None = None) -> Reading:
    return Reading(step, drift, 1.0, figures or (0.1, 4.0, -2.0), ())


@pytest.fixture
def known(fixed: Fixed) -> Fixed:
    return replace(fixed, figures=torch.tensor([0.1, 4.0, -2.0], dtype=torch.float64))


def falling(count: int) -> list[Reading]:
    """A healthy run: drift falls, figures come from afar to the teacher's."""
    return [reading(10 * k, 8.0 * 0.5**k, (0.1 + 0.3 * 0.5**k, 4.0, -2.0)) for k in range(count)]


def test_a_healthy_run_is_never_lost(known: Fixed) -> None:
    run = falling(12)
    for count in range(1, len(run) + 1):
        assert not lost(run[:count], known, last=True), count
    assert good(run, known) == run[-1].step


@pytest.mark.parametrize("which", range(4))
def test_each_figure_alone_ends_a_run_after_two_readings(which: int, known: Fixed) -> None:
    drift, figures = (0.1, [0.1, 4.0, -2.0])
    if which == 0:
        drift = 1e4
    else:
        figures[which - 1] = (2.0, 9.0, 0.5)[which - 1]
    run = [*falling(8), reading(80, drift, tuple(figures))]
    assert not lost(run, known, last=False)
    assert lost(run, known, last=True)
    run.append(reading(90, drift, tuple(figures)))
    (gone,) = lost(run, known, last=False)
    assert gone.name == (DRIFT, *NAMES)[which]
    assert f"outside {gone.low:.4g} to {gone.high:.4g}" in str(gone)
    assert good(run, known) == 70
    assert PATIENCE == 2


def test_what_is_no_number_is_outside_of_any_band(known: Fixed) -> None:
    run = [*falling(6), reading(60, float("nan")), reading(70, float("nan"))]
    assert {gone.name for gone in lost(run, known, last=False)} == {DRIFT}


def test_one_reading_outside_is_forgiven(known: Fixed) -> None:
    run = [*falling(8), reading(80, 1e4), reading(90, 0.1)]
    assert not lost(run, known, last=False)


def test_the_band_is_the_starts_until_three_readings_are_in(known: Fixed) -> None:
    run = falling(START + 1)
    assert bands(run[:START], known)[DRIFT][1] == max(GROWTH * 8.0, SHARE * known.power)
    assert bands(run, known)[DRIFT][1] == max(GROWTH * 4.0, SHARE * known.power)
    assert bands(run, known)[NAMES[0]] == pytest.approx((0.05, 2 * 0.25))


def test_content_training_may_leave_the_teacher_it_starts_as(known: Fixed) -> None:
    run = [reading(10 * k, 0.02 * SHARE * known.power * k) for k in range(40)]
    assert not lost(run, known, last=True)
