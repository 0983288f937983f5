"""bench/distill: statistics against known values, words and weights against made-up rows."""

from __future__ import annotations

import math
import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import _distill_arms as arms
import _distill_page as pages
import _distill_stats as stats
import _distill_verdict as words

DELTAS = (-0.31, -0.12, 0.05, -0.22, -0.4, 0.01, -0.18, -0.09)


def test_quantiles_of_student_are_the_tables() -> None:
    known = {(0.975, 1): 12.7062, (0.975, 4): 2.7764, (0.975, 7): 2.3646, (0.8, 7): 0.8960}
    for (share, freedom), value in known.items():
        assert stats.student(share, freedom) == pytest.approx(value, abs=1e-4)
    assert stats.below(0.0, 5) == pytest.approx(0.5)
    assert stats.below(-1.3, 6) == pytest.approx(1 - stats.below(1.3, 6))


def test_sign_flips_count_every_signing() -> None:
    assert stats.sign_flip([1.0] * 8) == 2 / 2**8
    assert stats.sign_flip([-1.0] * 3) == 2 / 2**3
    # of the eight sums of ±1 ±2 ±4 those of 7 and 5 reach |1 - 2 - 4| = 5
    assert stats.sign_flip([1.0, -2.0, -4.0]) == 4 / 8
    assert stats.sign_flip([1.0, -1.0]) == 1


def test_holm_steps_down_and_never_falls() -> None:
    found = stats.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert found == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})
    assert stats.holm({"a": 0.9, "b": 0.8})["a"] == 1


def test_pairs_are_of_the_seeds_that_both_have() -> None:
    found = stats.paired({0: 1.0, 1: 2.0, 2: 9.0}, {0: 1.5, 1: 2.75, 3: 0.0})
    assert found is not None
    assert found.deltas == (-0.5, -0.75)
    assert found.mean == -0.625
    assert found.low < found.mean < found.high
    assert stats.paired({0: 1.0}, {0: 2.0}) is None
    assert stats.bca([2.0, 2.0, 2.0]) == (2.0, 2.0)


def test_the_detectable_effect_is_seen_four_times_in_five() -> None:
    source, n = random.Random(1), 8
    effect = (stats.student(0.975, n - 1) + stats.student(0.8, n - 1)) / math.sqrt(n)
    seen = 0
    for _ in range(1000):
        values = [source.gauss(effect, 1) for _ in range(n)]
        seen += abs(sum(values) / n) > stats.interval(values)
    assert seen / 1000 == pytest.approx(0.8, abs=0.05)


def test_ranks_share_ties() -> None:
    assert stats.ranks([3.0, 1.0, 3.0, 2.0]) == [3.5, 1, 3.5, 2]
    assert stats.correlation([1, 2, 3], [2, 4, 5]) == pytest.approx(1)
    assert math.isnan(stats.correlation([1, 1], [2, 3]))


@pytest.mark.slow
def test_scipy_says_the_same() -> None:
    scipy = pytest.importorskip("scipy.stats")
    numpy = pytest.importorskip("numpy")
    for share in (0.6, 0.8, 0.975, 0.999):
        for freedom in range(1, 12):
            expected = scipy.t.ppf(share, freedom)
            assert stats.student(share, freedom) == pytest.approx(expected, rel=1e-9)
    test = scipy.permutation_test(
        (numpy.array(DELTAS),), numpy.mean, permutation_type="samples", n_resamples=numpy.inf
    )
    assert stats.sign_flip(DELTAS) == pytest.approx(test.pvalue, abs=1e-12)
    end = scipy.bootstrap(
        (numpy.array(DELTAS),), numpy.mean, n_resamples=20000, method="BCa",
        rng=numpy.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    assert stats.bca(DELTAS) == pytest.approx((end.low, end.high), abs=0.01)
    assert stats.correlation(DELTAS, DELTAS[::-1]) == pytest.approx(
        scipy.spearmanr(DELTAS, DELTAS[::-1]).statistic
    )
    mean, half = sum(DELTAS) / 8, stats.interval(DELTAS)
    assert (mean - half, mean + half) == pytest.approx(
        scipy.ttest_1samp(DELTAS, 0).confidence_interval(), rel=1e-9
    )


def made(**means: float) -> dict[str, dict[int, float]]:
    """Errors of eight seeds around a mean for each arm, seeds differing much, arms little."""
    seeds = [0.05, -0.05, 0.02, -0.02, 0.03, -0.03, 0.01, -0.01]
    return {
        f"{kind}-1": {
            k: mean + seeds[k] + 0.001 * math.cos(math.pi * (k + place)) for k in range(8)
        }
        for place, (kind, mean) in enumerate(means.items())
    }


def test_a_claim_needs_all_three_rivals_beaten() -> None:
    said = words.verdict(made(A1=0.50, A2=0.48, A3=0.50, A4=0.49), 1.0)
    assert said.startswith("The assessor helps here: A2's error is 4.")
    said = words.verdict(made(A1=0.50, A2=0.48, A3=0.48, A4=0.50), 1.0)
    assert said.startswith("No claim")
    assert "not below that of the placebo;" in said
    said = words.verdict(made(A1=0.50, A2=0.50, A3=0.52, A4=0.52), 1.0)
    assert said.startswith("No difference detected")
    assert "four times in five" in said
    said = words.verdict(made(A1=0.50, A2=0.53, A3=0.50, A4=0.50), 1.0)
    assert said.startswith("The assessor harms here: A2's error is 6.")
    assert "so it lies above the control and the placebo and its own mean" in said
    said = words.verdict(made(A1=0.50, A2=0.53, A3=0.50, A4=0.53), 1.0)
    assert "it cannot be told from its own mean weights, frozen." in said


def test_nothing_is_decided_before_every_seed_is_there() -> None:
    found = made(A1=0.5, A2=0.4, A3=0.5, A4=0.5)
    del found["A3-1"][6]
    assert words.verdict(found, 1.0) == "Not decided: 7 of 8 seeds are there."
    assert words.verdict({}, 1.0) == "Not decided: 0 of 8 seeds are there."
    found = made(A1=0.5, A2=0.4, A3=0.5, A4=0.5)
    found["A2-1"][0] = math.inf
    assert words.verdict(found, 1.0).startswith("Not decided")


def test_other_sentences_use_only_verbs_that_the_interval_carries() -> None:
    found = made(A1=0.5, A5=0.47, A7=0.5, N1=2.5)
    found["A0"] = {seed: error + 0.03 for seed, error in found["A1-1"].items()}
    said = " ".join(words.besides(found))
    assert "leaving the block term out raises the control's error" in said
    assert "learned weights lower the control's error (-6." in said
    assert "loss-aware times neither raise nor lower detectably the control's error" in said
    del found["A5-1"][3]
    said = " ".join(words.besides(found))
    assert "learned weights (only 7 of 8 seeds, not decided) raise or lower" in said
    assert "a student ends at 5.0 times the control's error" in said


def test_a_placebo_deals_out_the_same_factors_and_spends_the_same() -> None:
    base = torch.tensor([0.7, 1.0, 1.2])
    values = base * torch.tensor([2.0, 1.0, 0.5])
    found = arms.dealt(values, base, torch.tensor([2, 0, 1]))
    assert found.sum().item() == pytest.approx(2.9)
    factors = found / base
    assert (factors / factors[2]).tolist() == pytest.approx([0.5, 2.0, 1.0])


def test_learned_weights_come_to_rest_at_one_over_kd() -> None:
    base, kd = torch.ones(2), torch.tensor([[0.5, 0.25]])
    weigh = arms.Uncertainty(base)
    assert weigh(0, None, kd).tolist() == [1, 1]
    for step in range(400):
        found = weigh(step, None, kd)
    assert torch.exp(-weigh.s).tolist() == pytest.approx([2, 4], rel=1e-2)
    assert found.tolist() == pytest.approx([2 / 3, 4 / 3], rel=1e-2)


def test_loss_aware_times_follow_the_losses_and_keep_the_mean() -> None:
    aware = arms.LossAware(bins=4, history=3)
    even = (torch.arange(4000) + 0.5) / 4000
    t, weight = aware.draw(even)
    assert torch.allclose(t, even, atol=1e-6)
    assert weight.unique().tolist() == [1]
    for _ in range(5):
        aware.see(torch.tensor([1.0, 1.0, 1.0, 3.0]), torch.tensor([0.1, 0.3, 0.6, 0.9]))
    assert aware.chances().tolist() == pytest.approx([0.175, 0.175, 0.175, 0.475])
    t, weight = aware.draw(even)
    assert (t >= 0.75).float().mean().item() == pytest.approx(0.475, abs=1e-3)
    assert (weight * t).mean().item() == pytest.approx(0.5, abs=1e-3)


def test_a_curve_is_read_between_its_points() -> None:
    curve = [[0, 4.0], [10, 2.0], [20, 1.0]]
    assert arms.reached(curve, 3.0) == 5
    assert arms.reached(curve, 4.0) == 0
    assert arms.reached(curve, 1.0) == 20
    assert math.isnan(arms.reached(curve, 0.5))


ABOUT = {
    "how": {"steps": 20, "batch": 4, "rate": 1e-3, "decay": 0.0}, "parameters": 7, "sha256": "ab",
    "held": 9, "teacher": {"error": 0.4, "energy": 1.0}, "untrained": 0.9, "refused": '"no"',
    "assessor": {"accuracy": {"mid": 0.5}, "active": [True, False], "n": 100},
}  # fmt: skip


def row(arm: str, seed: int, error: float) -> dict:
    """A row as the bench writes it, of one block."""
    return {
        "arm": arm, "seed": seed, "error": error, "diverged": False, "energy": 1.0,
        "deciles": [error] * 10, "curve": [[0, 1.0], [20, error]], "weights_mean": [1.0] * 7,
        "weights_std": [0.0] * 7, "saturated": 0.25, "ratio": 0.015, "gradient_ratio": 0.1,
    }  # fmt: skip


def test_the_page_says_what_is_there_and_what_is_not() -> None:
    found = made(A1=0.50, A2=0.48, A3=0.50, A4=0.49, N1=1.5)
    rows = [row(arm, seed, error) for arm, seeds in found.items() for seed, error in seeds.items()]
    text = pages.page([each for each in rows if (each["arm"], each["seed"]) != ("N1-1", 7)], ABOUT)
    assert "- Weight 1: **The assessor helps here: A2's error is 4." in text
    assert "- Weight 0.05: **Not decided: 0 of 8 seeds are there.**" in text
    assert "N1-1 (7)" in text
    assert "| A2 | treatment: fused weights | 8 | 0.48000" in text
    assert "25.0% | 1.50% | 0.100 |" in text
    for arm, seeds in found.items():
        listed = " | ".join(f"{error:.5f}" for error in seeds.values())
        assert f"| {arm} | {listed} |" in text or arm == "N1-1"


def test_a_run_that_diverged_is_worse_than_any() -> None:
    rows = [row("A1-1", 0, 0.5), row("A2-1", 0, 0.5) | {"diverged": True}]
    assert math.isinf(words.errors(rows)["A2-1"][0])
    assert words.against(words.errors(rows), arms.ARMS["A2-1"], arms.ARMS["A1-1"]) is None
