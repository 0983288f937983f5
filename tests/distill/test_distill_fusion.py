"""Weights of the blocks: the published formula, its bounds, the budget, the state."""

import math

import pytest
import torch

from recast.distill.fusion import Fusion, base_weights, warned
from recast.distill.signals import AssessorOutput
from recast.errors import Refused

NINE = ("down_0", "down_1", "down_2", "down_3", "mid", "up_0", "up_1", "up_2", "up_3")
WEIGHTS = base_weights(NINE)


def signals(e_t: float, e_p: float = 0.0, coh: float = 1.0, active: bool = True) -> AssessorOutput:
    ones = torch.ones(3, 9)
    return AssessorOutput(NINE, e_t * ones, e_p * ones, coh * ones, torch.full((3,), active))


def uneven(seed: int) -> AssessorOutput:
    made = torch.Generator().manual_seed(seed)
    e_t, e_p, coh = (torch.rand(3, 9, generator=made) for _ in range(3))
    return AssessorOutput(NINE, e_t, e_p, coh, torch.tensor([True, True, False]))


def test_base_weights_are_those_published_and_their_symmetric_part() -> None:
    assert list(WEIGHTS.values()) == [0.7, 0.9, 1.0, 1.1, 1.2, 1.1, 1.0, 0.9, 0.7]
    seven = ("down_0", "down_1", "down_2", "mid", "up_0", "up_1", "up_2")
    assert list(base_weights(seven).values()) == [0.7, 0.9, 1.0, 1.2, 1.0, 0.9, 0.7]
    with pytest.raises(Refused, match="side_1"):
        base_weights(["side_1"])


def test_an_assessor_that_knows_nothing_saturates_seven_of_nine() -> None:
    fusion = Fusion(WEIGHTS, normalise="none")
    fused = fusion.weigh(signals(math.log(100), e_p=1.0, coh=0.5))
    assert (fused.values == 3.0).sum() == 7
    assert fused.saturated == pytest.approx(7 / 9)
    assert "77 %" in (warned(fused) or "")
    assert warned(Fusion(WEIGHTS).weigh(signals(0.1))) is None


def test_literal_weights_are_the_formula() -> None:
    fused = Fusion(WEIGHTS, normalise="none", ema=0.0).weigh(signals(0.4, 0.2, 0.6))
    expected = [w * (1 + 0.5 * 0.4 + 0.25 * 0.2 + 0.25 * 0.4) for w in WEIGHTS.values()]
    assert fused.values.tolist() == pytest.approx(expected)


def test_the_budget_is_that_of_the_base_weights() -> None:
    fusion = Fusion(WEIGHTS)
    for seed in range(5):
        fused = fusion.weigh(uneven(seed))
        assert fused.values.sum().item() == pytest.approx(sum(WEIGHTS.values()))
    assert (fused.spread > 0).all()
    even = Fusion(WEIGHTS).weigh(signals(0.7))
    assert even.values.tolist() == pytest.approx(list(WEIGHTS.values()))


def test_inactive_samples_say_nothing() -> None:
    assert Fusion(WEIGHTS).weigh(signals(5.0, active=False)).raw.tolist() == pytest.approx(
        list(WEIGHTS.values())
    )
    some = uneven(0)
    kept = AssessorOutput(NINE, *(s[:2] for s in (some.e_t, some.e_p, some.coh)), some.active[:2])
    assert torch.equal(Fusion(WEIGHTS).weigh(some).raw, Fusion(WEIGHTS).weigh(kept).raw)


def test_running_mean_and_every() -> None:
    fusion = Fusion(WEIGHTS, normalise="none", every=2)
    first, second, third = (fusion.weigh(signals(e)) for e in (0.0, 2.0, 2.0))
    assert torch.equal(first.values, second.values)
    assert third.values[0].item() == pytest.approx(0.9 * 0.7 + 0.1 * 1.4)


def test_state_goes_on_exactly() -> None:
    whole, broken = Fusion(WEIGHTS), Fusion(WEIGHTS)
    for seed in range(3):
        whole.weigh(uneven(seed)), broken.weigh(uneven(seed))
    resumed = Fusion(WEIGHTS)
    resumed.load_state_dict(broken.state_dict())
    a, b = whole.weigh(uneven(9)), resumed.weigh(uneven(9))
    assert torch.equal(a.values, b.values)
    assert torch.equal(a.spread, b.spread)


def test_it_refuses_what_it_cannot_use() -> None:
    Fusion(WEIGHTS).self_test()
    with pytest.raises(Refused, match="does not react"):
        Fusion(WEIGHTS, low=2.9).self_test()
    with pytest.raises(Refused, match="same blocks"):
        Fusion(base_weights(NINE[:5])).weigh(signals(0.1))
    with pytest.raises(Refused, match="not finite"):
        Fusion(WEIGHTS).weigh(signals(math.nan))
    with pytest.raises(Refused, match="'mean'"):
        Fusion(WEIGHTS, normalise="mean")
