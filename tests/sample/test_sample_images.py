from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch

from recast.errors import Refused
from recast.objective import EPS, FLOW, V_ZSNR, Objective
from recast.sample import Prompt, sample_images, sample_latents, sample_prompts
from recast.timesteps import grid


@dataclass
class Fake:
    """A model whose net pulls towards a grey that the prompt's length decides."""

    objective: Objective
    device = torch.device("cpu")
    largest = 0

    def condition(self, prompts, *, size=None):
        self.largest = max(self.largest, len(prompts))
        return torch.tensor([len(prompt) / 10 for prompt in prompts]).reshape(-1, 1, 1, 1)

    def net(self, condition):
        def answer(x, t):
            assert len(x) == len(condition) == len(t)
            x0 = 0.1 * torch.tanh(x) + condition
            alpha, sigma = (each.reshape(-1, 1, 1, 1) for each in self.objective.path(t))
            return self.objective.target(x0, (x - alpha * x0) / sigma, t)

        return answer

    def latent_shape(self, size=None):
        height, width = size or (16, 16)
        return 3, height // 8, width // 8

    def decode(self, latents):
        return latents.repeat_interleave(8, 2).repeat_interleave(8, 3)


PROMPTS = ["a", "abc", "abcde"]


def images(model, **options):
    return list(sample_images(model, PROMPTS, seeds=[1, 2, 3], steps=4, **options))


def test_pictures_come_in_order_with_their_prompts_and_seeds():
    pictures = images(Fake(FLOW), scale=2.0, batch=2)
    assert [(each.index, each.prompt, each.seed) for each in pictures] == [
        (0, "a", 1),
        (1, "abc", 2),
        (2, "abcde", 3),
    ]
    assert pictures[0].image.shape == (3, 16, 16)
    assert max(each.image.abs().max() for each in pictures) <= 1
    means = [each.image.mean().item() for each in pictures]
    assert means == sorted(means)


@pytest.mark.parametrize("solver", ["euler", "dpmpp_2s_ancestral"])
def test_a_picture_depends_on_its_seed_alone(solver):
    one, all_at_once = (
        images(Fake(V_ZSNR), solver=solver, scale=3.0, batch=batch) for batch in (1, 3)
    )
    for first, second in zip(one, all_at_once, strict=True):
        torch.testing.assert_close(first.image, second.image, rtol=0, atol=1e-5)
    (again,) = sample_images(Fake(V_ZSNR), ["abc"], seeds=[2], steps=4, solver=solver, scale=3.0)
    torch.testing.assert_close(again.image, one[1].image, rtol=0, atol=1e-5)


def test_guidance_batches_both_conditions_and_scale_one_asks_once():
    model = Fake(FLOW)
    images(model, scale=3.0)
    assert model.largest == 6
    model = Fake(FLOW)
    plain = images(model, scale=1.0)
    assert model.largest == 3
    torch.testing.assert_close(plain[0].image, images(Fake(FLOW), scale=1.0 + 1e-6)[0].image)


def test_as_objective_samples_the_same_model_on_another_path():
    native, wrapped = (
        list(
            sample_images(
                Fake(EPS), ["abc"], seeds=[5], steps=200, scale=1.0, as_objective=objective
            )
        )
        for objective in (None, FLOW)
    )
    torch.testing.assert_close(native[0].image, wrapped[0].image, rtol=0, atol=0.02)


@pytest.mark.parametrize(("solver", "calls"), [("euler", [1, 1, 1, 1]), ("heun", [2, 2, 2, 1])])
def test_a_trace_holds_every_state_met(solver, calls):
    trace = []
    images(Fake(EPS), scale=2.0, solver=solver, batch=3, trace=trace)
    assert [len(step.met) for step in trace] == calls
    times = grid(EPS.path, 4)
    assert [step.t for step in trace] == pytest.approx(times[1:])
    assert [step.met[0].t[0].item() for step in trace] == pytest.approx(times[:-1])
    for before, after in pairwise(trace):
        assert torch.equal(before.x, after.met[0].x)
    for met in (met for step in trace for met in step.met):
        for x0, eps in (met.positive, met.negative):
            torch.testing.assert_close(EPS.noise(x0, eps, met.t), met.x)


def test_pairs_are_met_at_scale_one_on_request():
    eps, times = torch.randn(1, 3, 2, 2), grid(FLOW.path, 3)
    net = Fake(FLOW).net(torch.tensor([0.1, 0.5]).reshape(2, 1, 1, 1))
    *_, last = sample_latents(net, FLOW, eps, times, scale=1.0, paired=True)
    *_, alone = sample_latents(
        lambda x, t: net(x.expand(2, 3, 2, 2), t.expand(2))[:1], FLOW, eps, times
    )
    assert last.met[0].negative is not None
    torch.testing.assert_close(last.x, alone.x)


def test_sampling_leaves_gradients_to_its_caller():
    """A generator's no_grad must not leak out between two steps."""
    net = Fake(FLOW).net(torch.zeros(1, 1, 1, 1, requires_grad=True))
    for step in sample_latents(net, FLOW, torch.randn(1, 3, 2, 2), grid(FLOW.path, 3)):
        assert torch.is_grad_enabled()
        assert not step.x.requires_grad


def test_unequal_lists_are_refused():
    with pytest.raises(Refused, match="3 prompts, 1 seeds"):
        list(sample_images(Fake(FLOW), PROMPTS, seeds=[1]))


def test_a_prompts_file_overrides_the_defaults_line_by_line():
    lines = [
        Prompt("abc"),
        Prompt("abc", seed=1),
        Prompt("abc", width=32, height=24, steps=2, solver="heun"),
        Prompt("abc", negative="a long one", seed=1),
    ]
    pictures = list(sample_prompts(Fake(FLOW), lines, seed=7, steps=4, scale=2.0))
    assert [each.index for each in pictures] == [0, 1, 2, 3]
    assert [each.seed for each in pictures] == [7, 1, 9, 1]
    assert pictures[2].image.shape == (3, 24, 32)
    assert (pictures[1].image > pictures[3].image).all()
