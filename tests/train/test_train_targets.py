"""Targets of one draw agree across objectives, hand over where they must, and mix."""

import pytest
import torch
from tests.train.tiny_run import draw
from torch import Tensor

from recast.objective import EPS, FLOW, V_ZSNR, V, retime
from recast.train import from_data, from_teacher, guided, mix, noised, replayed


def oracle(x0: Tensor, objective):
    """A network that knows x0 and answers in its objective."""

    def net(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (c.view(-1, 1, 1, 1) for c in objective.path(t))
        return objective.target(x0, (x - alpha * x0) / sigma, t)

    return net


@pytest.mark.parametrize("source", [EPS, V, V_ZSNR], ids=lambda o: o.name)
def test_a_perfect_teacher_gives_the_data_target(source) -> None:
    d = draw(0, n=16)
    calls = []

    def teacher(condition: object):
        calls.append(condition)
        return oracle(d.x0, source)

    answer = from_teacher(teacher, source, FLOW)(d)
    assert torch.allclose(answer.value, from_data(FLOW)(d).value, atol=2e-3)
    assert calls == [None]
    assert not answer.value.requires_grad


def test_the_teacher_hands_over_above_its_range() -> None:
    t = torch.tensor([0.5, 0.95, 0.99, 1.0])
    d = draw(0)
    d = noised(FLOW, d.x0, t, d.eps)
    wrong = torch.zeros_like(d.x0)

    def teacher(condition: object):
        return lambda x, t: wrong

    data = from_data(FLOW)(d).value
    handed = from_teacher(teacher, EPS, FLOW)(d).value
    assert torch.equal(handed[1:], data[1:])
    assert not torch.allclose(handed[0], data[0])
    kept = from_teacher(teacher, EPS, FLOW, above="fallback")(d).value
    assert torch.isfinite(kept).all()
    assert not torch.allclose(kept[1:], data[1:], atol=0.1)
    assert torch.equal(kept[0], handed[0])


def test_replay_needs_no_teacher() -> None:
    def teacher(condition: object):
        raise AssertionError("asked")

    d = draw(2)
    there = retime(d.t, FLOW.path, V_ZSNR.path)
    for objective, t in ((FLOW, d.t), (V_ZSNR, there)):
        answer = from_teacher(teacher, EPS, objective)(replayed(objective, d.x0, t, d.eps))
        assert torch.equal(answer.value, objective.target(d.x0, d.eps, t))


def test_amplification_control_weighs_noisy_samples_down() -> None:
    d = draw(0)
    d = noised(FLOW, d.x0, torch.tensor([0.1, 0.7, 0.9, 0.99]), d.eps)
    weight = from_teacher(lambda c: oracle(d.x0, EPS), EPS, FLOW, control=True)(d).weight
    assert torch.allclose(weight, torch.tensor([1.0, 1.0, 0.2, 0.002]), atol=1e-4)


def test_a_mix_has_the_gradient_of_the_summed_losses() -> None:
    d = draw(0)
    parts = (
        (from_data(FLOW), lambda t: 1 - t),
        (from_teacher(lambda c: lambda x, t: x, EPS, FLOW), lambda t: 3 * t),
    )
    output = torch.randn(d.x.shape, requires_grad=True)

    def loss(answer) -> Tensor:
        return (answer.weight * (output - answer.value).square().flatten(1).mean(1)).mean()

    (mixed,) = torch.autograd.grad(loss(mix(*parts)(d)), output)
    both = sum(
        (share(d.t) * (output - part(d).value).square().flatten(1).mean(1)).mean()
        for part, share in parts
    )
    (summed,) = torch.autograd.grad(both, output)
    assert torch.allclose(mixed, summed, atol=1e-6)
    nothing = mix((from_data(FLOW), torch.zeros_like))(d)
    assert nothing.weight.sum() == 0
    assert torch.isfinite(nothing.value).all()


def test_above_its_range_data_and_fallback_may_be_averaged() -> None:
    d = draw(0)
    d = noised(FLOW, d.x0, torch.tensor([0.5, 0.95, 0.99, 1.0]), d.eps)

    def teacher(condition: object):
        return lambda x, t: 0.1 * x

    found = {
        above: from_teacher(teacher, EPS, FLOW, above=above)(d).value
        for above in ("data", "fallback", "both")
    }
    torch.testing.assert_close(found["both"], (found["data"] + found["fallback"]) / 2)
    assert torch.equal(found["both"][0], found["data"][0])
    assert not torch.allclose(found["both"][1:], found["data"][1:], atol=0.1)


@pytest.mark.parametrize("source", [EPS, V, FLOW], ids=lambda o: o.name)
def test_a_guided_teacher_is_guidance_in_one_pass(source) -> None:
    """What it wants is the target made of the guided x0, whatever it predicts itself."""
    d = draw(0)
    pictures = {"a": d.x0, "": d.x0.flip(0)}

    def teacher(condition: str):
        return oracle(pictures[condition], source)

    asked = []

    def null(condition: str) -> str:
        asked.append(condition)
        return ""

    def answer(condition: str, scale: float) -> Tensor:
        d_c = noised(FLOW, d.x0, d.t * 0.9, d.eps, condition)
        return from_teacher(guided(teacher, null, scale), source, FLOW)(d_c).value

    t = d.t * 0.9
    x = FLOW.noise(d.x0, d.eps, t)
    x0 = pictures[""] + 3 * (pictures["a"] - pictures[""])
    wide = t.view(-1, 1, 1, 1)
    wanted = FLOW.target(x0, (x - (1 - wide) * x0) / wide, t)
    assert asked == []
    assert torch.allclose(answer("a", 3.0), wanted, rtol=1e-2, atol=1e-2)
    assert asked == ["a"]
    assert torch.allclose(answer("", 3.0), answer("", 1.0))
    plain = from_teacher(teacher, source, FLOW)(noised(FLOW, d.x0, t, d.eps, "a")).value
    assert torch.allclose(answer("a", 1.0), plain, atol=1e-5)
