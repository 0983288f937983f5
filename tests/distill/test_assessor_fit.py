"""Fitting, calibrating and reporting an assessor, on features whose answer is known."""

from collections.abc import Iterator

import pytest
import torch

from recast.distill import report
from recast.distill.assessor import Assessor, Shape, bin_of
from recast.distill.calibrate import calibrate, temperature
from recast.distill.fit import Memory, Weights, fit, losses, pattern_terms, sinkhorn
from recast.errors import NotFinite, Refused

Pooled = dict[str, torch.Tensor]
SHAPE = Shape({"down_0": 6, "mid": 4}, 16, 24, 8, 3, "shared")


def features(n: int, seed: int, noise: float = 0.05) -> tuple[Pooled, torch.Tensor]:
    """down_0 shows the time, mid shows nothing."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.rand(n, generator=generator)
    angles = t[:, None] * torch.tensor([1.0, 2.0, 4.0])
    seen = torch.cat([angles.cos(), angles.sin()], 1)
    seen = seen + noise * torch.randn(seen.shape, generator=generator)
    return {"down_0": seen, "mid": torch.randn(n, 4, generator=generator)}, t


def batches(seed: int = 0) -> Iterator[tuple[Pooled, torch.Tensor]]:
    while True:
        yield features(64, seed)
        seed += 1


@pytest.fixture(scope="module")
def fitted() -> Assessor:
    made = Assessor(SHAPE, torch.Generator().manual_seed(0))
    made.standardise(features(500, 99)[0])
    steps = list(fit(made, batches(), steps=120, lr=3e-3))
    assert [each.step for each in steps] == list(range(1, 121))
    assert steps[-1].loss < steps[0].loss
    assert set(steps[0].terms) == {"time", "pattern", "margin", "usage", "simplex", "staircase",
                                   "position"}  # fmt: skip
    assert steps[-1].lr < 1e-5
    calibrate(made, *features(400, 77))
    return made.eval()


def test_a_block_that_shows_the_time_is_read_and_one_that_does_not_is_not(
    fitted: Assessor,
) -> None:
    figures = report.measure(fitted, *features(800, 55))
    assert figures["down_0"].top1 > 0.6
    assert figures["down_0"].within1 > 0.95
    assert figures["mid"].top1 < 0.2
    assert figures["mid"].ce == pytest.approx(torch.tensor(8.0).log().item(), abs=0.15)
    assert figures["down_0"].ece < 0.1
    assert figures["down_0"].usage > 0.9
    assert figures["down_0"].quality[1] > 0.4


def test_figures_of_bins_add_up(fitted: Assessor) -> None:
    pooled, t = features(300, 5)
    one = report.measure(fitted, pooled, t)["down_0"]
    assert sum(one.bins.n) == one.n == 300
    assert sum(one.bins.right) / 300 == pytest.approx(one.top1)
    k = bin_of(t, 8)
    right = fitted(pooled)["down_0"].time_logits.argmax(1) == k
    assert one.bins.right[3] == int(right[k == 3].sum())
    both = report.over_blocks(report.measure(fitted, pooled, t), "ce")
    assert both.shape == (8,)
    assert both.min() > 0


def test_the_position_is_learned(fitted: Assessor) -> None:
    pooled, t = features(300, 6)
    assert (fitted(pooled)["down_0"].u - t).abs().mean() < 0.18  # a constant is off by 0.25


# controls


def test_mismatch_tells_the_clock_from_the_noise_level(fitted: Assessor) -> None:
    pooled, t = features(600, 7)
    other = t[torch.randperm(600, generator=torch.Generator().manual_seed(0))]
    found = report.mismatch(fitted, pooled, t, other)["down_0"]
    assert found.fed > 0.6
    assert found.true < 0.25
    swapped = report.mismatch(fitted, pooled, other, t)["down_0"]
    assert (swapped.fed, swapped.true) == (found.true, found.fed)


def test_cross_entropy_rises_under_shuffled_features_and_stays_under_shifted_logits(
    fitted: Assessor,
) -> None:
    pooled, t = features(600, 8)
    before, after = report.shuffled(fitted, pooled, t)
    assert after > before + 0.5
    assert report.shifted(fitted, pooled, t) < report.STILL


def test_an_untrained_probe_puts_seven_of_nine_published_weights_at_least_at_their_bound() -> None:
    blocks = [*(f"down_{k}" for k in range(4)), "mid", *(f"up_{k}" for k in range(4))]
    made = Assessor(Shape(dict.fromkeys(blocks, 5), 128, 32, prototypes="shared"))
    generator = torch.Generator().manual_seed(0)
    pooled = {name: torch.randn(200, 5, generator=generator) for name in blocks}
    found = report.untrained(made, pooled, torch.rand(200, generator=generator))
    assert sum(each == 3.0 for each in found.values()) >= 7
    assert all(found[name] == 3.0 for name in blocks[1:-1])
    assert all(found[name] > 2.5 for name in ("down_0", "up_3"))


# patterns


def test_sinkhorn_shares_patterns_evenly_within_each_bin() -> None:
    logits = torch.randn(2, 60, 3, generator=torch.Generator().manual_seed(0))
    logits[1, :, 0] += 4  # everybody's favourite
    there = torch.ones(2, 60, dtype=torch.bool)
    there[0, 30:] = False
    found = sinkhorn(logits, there)
    torch.testing.assert_close(found.sum(2), there.float())
    torch.testing.assert_close(found.sum(1)[1], torch.full((3,), 20.0), rtol=0.2, atol=0)
    torch.testing.assert_close(found.sum(1)[0], torch.full((3,), 10.0), rtol=0.2, atol=0)


def test_the_memory_keeps_bins_apart_and_forgets_the_oldest() -> None:
    memory = Memory(Assessor(SHAPE))
    k = torch.tensor([2, 5, 2, 2, 5])
    logits = torch.arange(15.0).view(5, 3)
    memory.assign(logits, k)
    assert memory.count.tolist() == [0, 0, 3, 0, 0, 2, 0, 0]
    assert torch.equal(memory.logits[2, :3], logits[[0, 2, 3]])
    assert torch.equal(memory.logits[5, :2], logits[[1, 4]])
    for _ in range(40):
        memory.assign(-logits, k)
    assert memory.depth == 96
    assert torch.equal(memory.logits[2, 0], -logits[0])


def test_assigned_patterns_balance_over_many_small_batches() -> None:
    memory, generator = Memory(Assessor(SHAPE)), torch.Generator().manual_seed(0)
    found = []
    for _ in range(60):
        logits = torch.randn(16, 3, generator=generator) + torch.tensor([4.0, 0.0, 0.0])
        found.append(memory.assign(logits, torch.zeros(16, dtype=torch.long)))
    shares = torch.cat(found[20:]).bincount(minlength=3) / 640
    assert shares.min() > 0.2


def test_pattern_terms_are_those_of_their_formula() -> None:
    logits = torch.tensor([[2.0, 0.5, 0.0], [0.0, 1.0, 3.0]])
    found = pattern_terms(logits, torch.tensor([0, 1]))
    assert found["margin"] == pytest.approx((0 + 3) / 2)
    expected = -(logits.log_softmax(1)[[0, 1], [0, 1]]).mean()
    torch.testing.assert_close(found["pattern"], expected)
    assert pattern_terms(torch.zeros(4, 3), torch.zeros(4).long())["usage"].item() == pytest.approx(
        0, abs=1e-6
    )


def test_given_patterns_are_learned() -> None:
    made = Assessor(SHAPE, torch.Generator().manual_seed(1))

    def labelled() -> Iterator[tuple[Pooled, torch.Tensor, torch.Tensor]]:
        for seed in range(80):
            pooled, t = features(64, seed)
            yield pooled, t, pooled["mid"].argmax(1) % 3

    list(fit(made, labelled(), steps=80, lr=1e-2))
    pooled, t = features(200, 500)
    k = bin_of(t, 8)
    guess = made.pattern_logits("mid", made(pooled)["mid"].z, k).argmax(1)
    assert (guess == pooled["mid"].argmax(1) % 3).float().mean() > 0.7


# fitting


def test_every_term_teaches_something() -> None:
    made = Assessor(SHAPE, torch.Generator().manual_seed(0))
    pooled, t = features(64, 0)
    with torch.no_grad():
        for name in made.blocks:
            made.probe(name).points[0, :, 2:] *= 0.1  # a nearly flat simplex
    terms, _ = losses(made, pooled, t, {name: Memory(made) for name in made.blocks})
    for name, term in terms.items():
        made.zero_grad()
        term.sum().backward(retain_graph=True)
        grads = [each.grad for each in made.parameters() if each.grad is not None]
        assert any(bool(grad.any()) for grad in grads), name
        assert all(bool(grad.isfinite().all()) for grad in grads), name


def test_a_feature_similarity_weight_is_refused() -> None:
    with pytest.raises(Refused, match="feature_similarity_weight is 0 or absent"):
        Weights(feature_similarity_weight=0.4)


def test_features_that_are_not_finite_stop_the_fit_before_they_reach_the_weights() -> None:
    made = Assessor(SHAPE)
    before = {name: each.clone() for name, each in made.state_dict().items()}
    pooled, t = features(8, 0)
    pooled["mid"][0] = torch.nan
    with pytest.raises(NotFinite, match="step 1"):
        next(fit(made, iter([(pooled, t)]), steps=3))
    assert all(torch.equal(before[name], each) for name, each in made.state_dict().items())


# temperatures


@pytest.mark.parametrize("true", [0.25, 1.0, 5.0])
def test_a_known_temperature_is_found(true: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8000, 6, generator=generator)
    labels = logits.softmax(1).multinomial(1, generator=generator)[:, 0]
    assert temperature(true * logits, labels) == pytest.approx(true, rel=0.1)


def test_calibration_never_worsens_the_cross_entropy_and_keeps_every_guess() -> None:
    made = Assessor(SHAPE, torch.Generator().manual_seed(0))
    pooled, t = features(300, 0)
    k = bin_of(t, 8)
    before = made(pooled)["down_0"].time_logits
    calibrate(made, pooled, t)
    after = made(pooled)["down_0"].time_logits
    worse = torch.nn.functional.cross_entropy(after, k) - torch.nn.functional.cross_entropy(
        before, k
    )
    assert worse <= 1e-6
    assert torch.equal(before.argmax(1), after.argmax(1))
    first = made.probe("mid").time_temperature.clone()
    calibrate(made, pooled, t)
    assert torch.equal(first, made.probe("mid").time_temperature)
