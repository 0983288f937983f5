"""The sampler of times: its histogram, its weights, its floor; and the belief in bins."""

import math

import pytest
import torch

from recast.distill.reliability import active_bins, wilson
from recast.distill.sampler import Profile, sampler, shifted
from recast.errors import Refused

K = 20


def rough(active: bool = True) -> Profile:
    generator = torch.Generator().manual_seed(3)
    difficulty = 0.2 + 3 * torch.rand(K, generator=generator, dtype=torch.float64)
    believed = torch.ones(K, dtype=torch.bool)
    if not active:
        difficulty[4] = 1e6
        believed[4] = False
    return Profile(difficulty, torch.rand(K, generator=generator, dtype=torch.float64), believed)


def drawn(made, n: int = 200_000) -> tuple[torch.Tensor, torch.Tensor]:
    return made.draw(n, torch.Generator().manual_seed(11))


def histogram(t: torch.Tensor, bins: int) -> torch.Tensor:
    return torch.bincount((t * bins).long(), minlength=bins).double()


def test_without_shift_and_difficulty_times_are_uniform() -> None:
    t, w = drawn(sampler(Profile.flat(K), toward="noise"))
    expected = len(t) / 50
    chi = ((histogram(t, 50) - expected).square() / expected).sum().item()
    assert abs(chi - 49) < 4.5 * math.sqrt(2 * 49)
    assert torch.equal(w, torch.ones_like(w))
    uneven, _ = drawn(sampler(Profile.flat(K), toward="noise", shift=1.2, eta=0.0))
    assert ((histogram(uneven, 50) - expected).square() / expected).sum().item() > 500


@pytest.mark.parametrize("toward", ["noise", "clean"])
def test_the_histogram_is_that_of_the_chances(toward: str) -> None:
    made = sampler(rough(), toward=toward, shift=3.0)
    t, _ = drawn(made)
    n = len(t)
    sigma = (n * made.chances * (1 - made.chances)).sqrt()
    assert ((histogram(t, K) - n * made.chances).abs() < 5 * sigma).all()
    heavy = made.chances[-3:].sum() > made.chances[:3].sum()
    assert heavy == (toward == "noise")


def test_shift_three_is_nine_times_as_dense_at_the_end_it_goes_to() -> None:
    q = shifted(10_000, 3.0, "noise")
    assert (q[-1] / q[0]).item() == pytest.approx(9, rel=1e-3)
    assert q.sum().item() == pytest.approx(1)


def test_weights_make_up_for_the_chances() -> None:
    made = sampler(rough(), toward="noise", shift=3.0)
    t, w = drawn(made)
    for f in (lambda t: t, lambda t: (5 * t).sin()):
        u = (torch.arange(100_000) + 0.5) / 100_000
        seen, spread = (w * f(t)).mean().item(), (w * f(t)).std().item() / math.sqrt(len(t))
        assert abs(seen - f(u).mean().item()) < 5 * spread
        assert abs(f(t).mean().item() - f(u).mean().item()) > 5 * spread, "the draw is even"
    assert (made.chances * made.weights).sum().item() == pytest.approx(1)
    literal = sampler(rough(), toward="noise", shift=3.0, importance=False)
    assert torch.equal(literal.weights, torch.ones_like(literal.weights))


def test_no_bin_falls_below_the_floor() -> None:
    extreme = Profile(
        torch.logspace(-8, 8, K, dtype=torch.float64), torch.zeros(K), torch.ones(K).bool()
    )
    assert sampler(extreme, toward="noise", shift=50.0).chances.min().item() >= 0.2 / K
    assert sampler(extreme, toward="noise", shift=50.0, eta=0.0).chances.min().item() < 0.02 / K


def test_a_bin_that_is_not_believed_counts_as_the_median() -> None:
    there, without = (sampler(rough(a), toward="noise", eta=0.0).chances for a in (True, False))
    ordinary = rough().difficulty[rough(False).active].median()
    at = rough().difficulty.index_fill(0, torch.tensor([4]), float(ordinary))
    told = Profile(at, rough().pattern, torch.ones(K).bool())
    assert torch.allclose(without, sampler(told, toward="noise", eta=0.0).chances)
    assert not torch.allclose(there, without)


def test_chaos_reaches_past_the_bin_and_stays_on_the_path() -> None:
    still = Profile(torch.ones(2, dtype=torch.float64), torch.ones(2), torch.ones(2).bool())
    t, _ = drawn(sampler(still, toward="noise", chaos=True))
    assert t.min() > 0
    assert t.max() < 1
    quiet, _ = drawn(sampler(still, toward="noise", jitter=0.1))
    assert ((quiet - 0.25).abs().minimum((quiet - 0.75).abs()) <= 0.0251).all()
    assert ((t - 0.25).abs().minimum((t - 0.75).abs()) > 0.2).any()


def test_draws_are_functions_of_their_generator() -> None:
    made = sampler(rough(), toward="noise")
    one, two = drawn(made, 64), drawn(made, 64)
    assert torch.equal(one[0], two[0])
    assert not torch.equal(one[0], made.draw(64, torch.Generator().manual_seed(12))[0])


@pytest.mark.parametrize("bad", [{"toward": "up"}, {"shift": 0.0}, {"eta": 2.0}])
def test_bad_settings_are_refused(bad: dict) -> None:
    with pytest.raises(Refused):
        sampler(Profile.flat(4), **{"toward": "noise", **bad})


def test_wilson_agrees_with_published_values() -> None:
    # 8 of 10 at 95 %: 0.4902 to 0.9433; 0 of n ends at 0, nothing counted says nothing
    found = wilson(torch.tensor([8.0, 0.0, 0.0]), torch.tensor([10, 10, 0]))
    assert found[0].item() == pytest.approx(0.4902, abs=1e-4)
    assert found[1:].tolist() == [0, 0]


def test_bins_are_believed_by_their_lower_bound() -> None:
    n = torch.full((10,), 100)
    correct = torch.tensor([50, 50, 50, 50, 50, 50, 50, 50, 16, 1])
    assert active_bins(correct, n).tolist() == [True] * 8 + [False, False]
    assert active_bins(correct, n, worst=0.3).sum() == 7
    with pytest.raises(Refused, match="unusable"):
        active_bins(torch.tensor([50] * 4 + [1] * 6), n)
