"""Times and noise by recipe: pure functions of the step, dealt out whole, and refused when idle."""

from __future__ import annotations

import pytest
import torch

from recast.convert.checks import check_draws
from recast.convert.losses import distance_of, weighting_of
from recast.convert.noising import dealt, draw, noise, remarks, times
from recast.convert.replay import Replay
from recast.dream import Shard
from recast.errors import Refused
from recast.objective import EPS, FLOW, retime
from recast.recipe import Recipe, load, override
from recast.text.encode import Condition
from recast.timesteps import shift, stratified
from recast.train import Aware, check, seeded
from recast.train.loss import huber
from recast.weighting import min_snr, p2


def recipe(**sections: object) -> Recipe:
    return override(load(), **sections)


def test_plain_noise_and_times_are_those_of_their_counters() -> None:
    """What runs before these keys existed drew: resumes and records depend on it."""
    how = recipe(batch=4, accumulate=3, seed=5)
    t, weight = times(how, 7)
    assert torch.equal(t, stratified(12, seeded(5, "times", 7)))
    assert weight is None
    x0 = torch.zeros(4, 4, 8, 8)
    plain = torch.randn(x0.shape, generator=seeded(5, "noise", 21))
    assert torch.equal(noise(how, x0, 21), plain)


@pytest.mark.parametrize("name", ["stratified", "loss-aware"])
def test_strata_reach_across_accumulation(name: str) -> None:
    how = recipe(batch=1, accumulate=8, times=name)
    aware = Aware() if name == "loss-aware" else None
    parts = dealt(how, 3, aware)
    assert len(parts) == 8
    assert sorted(int(t.item() * 8) for t, _ in parts) == list(range(8))
    assert all((weight is None) == (aware is None) for _, weight in parts)


def test_noise_options_act_in_turn_and_repeat() -> None:
    x0 = torch.randn(8, 4, 8, 8, generator=seeded("x0"))
    all_on = {"multires": 3, "offset": 0.1, "pairing": "optimal", "perturbation": 0.1}
    how = recipe(noise=all_on)
    assert torch.equal(noise(how, x0, 3), noise(how, x0, 3))
    assert not torch.equal(noise(how, x0, 3), noise(how, x0, 4))
    t, bound = torch.rand(8, generator=seeded("t")), Condition(torch.zeros(8, 1, 1))
    made = draw(how, FLOW, 3, x0, t, None, bound, torch.arange(8))
    assert torch.equal(made.eps, noise(how, x0, 3))
    clean = FLOW.noise(x0, made.eps, t)
    assert (made.x - clean).abs().max() > 0.01
    check(made, FLOW)


def test_pairing_has_no_effect_at_batch_1_and_says_so() -> None:
    alone = recipe(batch=1, noise={"pairing": "optimal"})
    x0 = torch.randn(1, 4, 8, 8)
    assert torch.equal(noise(alone, x0, 3), noise(recipe(), x0, 3))
    (said,) = remarks(alone)
    assert "no effect" in said
    assert list(remarks(override(alone, batch=2))) == list(remarks(recipe())) == []


def test_larger_pictures_are_shifted_by_the_root_of_their_pixels() -> None:
    how = recipe(shift=1.5, shift_side=64)
    t, bound = torch.rand(2, generator=seeded("t")), Condition(torch.zeros(2, 1, 1))
    for side in (8, 16, 24):
        x0 = torch.randn(2, 4, side, side)
        made = draw(how, FLOW, 0, x0, t, None, bound, torch.arange(2), factor=8)
        assert torch.allclose(made.t, shift(t, 1.5 * side / 8))
        assert torch.allclose(made.x, FLOW.noise(x0, made.eps, made.t))


def replay(how: Recipe, objective: object = FLOW) -> Replay:
    """Two pictures of forty states; u is 1 with the prompt and 0 without."""
    t = torch.linspace(1, 0.025, 40)
    ones = torch.ones(40, 2, 4, 8, 8)
    shard = Shard(("a", "b"), t, ones * t.view(-1, 1, 1, 1, 1), ones, 0 * ones, (False, False))
    rows = Condition(torch.arange(3.0).view(3, 1, 1))
    return Replay((shard,), rows, {"a": 0, "b": 1, "": 2}, how, objective, "cpu", 8)


def test_replay_takes_the_states_nearest_to_the_times_aimed_at() -> None:
    how = recipe(batch=64, times="logit-normal", mean=2.0, std=0.3, steps=1)
    (made,) = replay(how).draws(0)
    aimed, _ = times(how, 0)
    assert (made.t - aimed).abs().max() <= 0.5 / 40 + 1e-6
    (even,) = replay(recipe(batch=64, steps=1)).draws(0)
    assert even.t.mean() < 0.65 < made.t.mean()
    (there,) = replay(how, EPS).draws(0)
    wanted = retime(FLOW.path.time(*EPS.path(aimed)), FLOW.path, EPS.path)
    assert (there.t - wanted).abs().max() < 0.05
    aware = Aware()
    aware.update(torch.tensor([0.05, 0.95]), torch.tensor([0.0, 9.0]))
    (weighed,) = replay(recipe(batch=64, times="loss-aware", steps=1)).draws(0, aware)
    assert weighed.weight is not None
    assert weighed.weight.unique().numel() > 1


def test_replay_guides_its_stored_answers() -> None:
    """With u = 1 and u_null = 0, guidance w makes u = w; unprompted rows stay."""
    how = recipe(batch=32, steps=1, guided=3.0)
    (made,) = replay(how).draws(0)
    u = (made.teacher[1] - made.teacher[0]).mean((1, 2, 3))
    gone = made.index == 2
    assert gone.any()
    assert torch.allclose(u[gone], torch.zeros(1))
    assert torch.allclose(u[~gone], torch.tensor(3.0))
    assert replay(how).null().context.item() == 2


def test_losses_are_built_with_their_arguments() -> None:
    alpha, sigma = FLOW.path(torch.linspace(0.05, 0.95, 7))
    for name, wanted in (("min-snr", min_snr(2.0)), ("p2", p2(3.0, 2.0))):
        how = recipe(weighting=name, gamma=2.0, p2_k=3.0, p2_gamma=2.0)
        found = weighting_of(how)
        assert found is not None
        assert torch.equal(found(alpha, sigma, FLOW), wanted(alpha, sigma, FLOW))
    assert weighting_of(recipe(weighting="edm2")) is None
    a, b = torch.randn(2, 3, 4, 8, 8)
    constant = distance_of(recipe(distance="huber", huber_c=0.4))
    assert torch.equal(constant.measure(a, b), huber(a, b, 0.4))
    exponential = distance_of(recipe(distance="huber", huber_c=0.4, huber_schedule="exponential"))
    assert exponential.scale is not None
    assert exponential.scale(FLOW.path, torch.tensor([1.0])).item() == pytest.approx(0.4)
    assert distance_of(recipe(distance="fft")).of_x0


@pytest.mark.parametrize(
    ("sections", "replays", "said"),
    [
        ({"times": "loss-aware", "shift": 2.0}, False, "set train.shift to 1"),
        ({"times": "loss-aware", "weighting": "edm2"}, False, "choose one of the two"),
        ({"teacher": "data", "guided": 2.0}, False, "target.guided"),
        ({"noise": {"offset": 0.1}}, True, "bring their own noise"),
        ({"noise": {"pairing": "optimal"}}, True, "bring their own noise"),
    ],
)
def test_keys_that_would_do_nothing_are_refused(
    sections: dict[str, object], replays: bool, said: str
) -> None:
    with pytest.raises(Refused, match=said):
        check_draws(recipe(**sections), replays=replays)
    check_draws(recipe(), replays=replays)
