"""The data contract is checked, replay agrees with itself, generators are functions of counters."""

from dataclasses import replace

import pytest
import torch
from tests.train.tiny_run import draw

from recast.errors import Refused
from recast.objective import EPS, FLOW, V_ZSNR
from recast.train import check, checked, replayed, seeded


@pytest.mark.parametrize("objective", [EPS, V_ZSNR, FLOW], ids=lambda o: o.name)
def test_noised_draws_pass(objective) -> None:
    for step in range(5):
        check(draw(step, objective), objective)
    ends = draw(0, objective)
    for t in (0.0, 1.0):
        here = torch.full_like(ends.t, t)
        check(replace(ends, t=here, x=objective.noise(ends.x0, ends.eps, here)), objective)


def test_perturbed_input_passes() -> None:
    d = draw(0, size=16)
    check(replace(d, x=d.x + 0.1 * d.t.view(-1, 1, 1, 1) * torch.randn(d.x.shape)), FLOW)


def test_broken_contracts_are_refused() -> None:
    d = draw(0)
    with pytest.raises(Refused, match="times the data that the flow path"):
        list(checked([replace(d, x=torch.randn_like(d.x))], FLOW))
    with pytest.raises(Refused, match="path"):
        check(replace(d, x=EPS.noise(d.x0, d.eps, d.t)), FLOW)
    with pytest.raises(Refused, match="path"):
        check(replace(d, x0=d.x0 * 1.05), FLOW)
    with pytest.raises(Refused, match="all zero"):
        check(replace(d, x0=torch.zeros_like(d.x0)), FLOW)


def test_only_the_first_draws_are_checked() -> None:
    good, bad = draw(0), replace(draw(1), x=torch.zeros(4, 4, 4, 4))
    assert len(list(checked([good, good, bad], FLOW, first=2))) == 3


def test_a_replayed_answer_makes_its_own_state() -> None:
    d = draw(3)
    again = replayed(FLOW, d.x0, d.t, d.eps)
    assert torch.equal(again.x, d.x)
    assert again.teacher == (d.x0, d.eps)
    check(again, FLOW)


def test_generators_depend_on_their_counters_only() -> None:
    def numbers(*counters: int | str) -> list[float]:
        return torch.rand(3, generator=seeded(*counters)).tolist()

    assert numbers(1, "noise", 2) == numbers(1, "noise", 2)
    assert len({tuple(numbers(*c)) for c in [(1, 2), (2, 1), (12,), (1, "2"), (1, 2, 0)]}) == 5
