"""The time embedding learns another clock in closed form."""

import math

import torch
from torch import Tensor, nn

from recast.objective import EPS, FLOW
from recast.train import fit_clock, fit_output

torch.set_num_threads(1)


class Embedding(nn.Module):
    """diffusers' TimestepEmbedding, small."""

    def __init__(self) -> None:
        super().__init__()
        self.linear_1, self.act, self.linear_2 = nn.Linear(32, 64), nn.SiLU(), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(self.act(self.linear_1(x)))


def features(t: Tensor) -> Tensor:
    angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(16) / 16)
    return torch.cat([angles.cos(), angles.sin()], 1)


def test_each_stage_lowers_the_error_and_the_module_is_left_alone() -> None:
    torch.manual_seed(0)
    module = Embedding()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    fit = fit_clock(module, features, EPS.path, FLOW.path, points=400, steps=100)
    assert fit.after < fit.solved < 0.6 * fit.before
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    module.load_state_dict(fit.weights)


def test_the_same_clock_needs_nothing() -> None:
    fit = fit_clock(Embedding(), features, FLOW.path, FLOW.path, points=50, steps=1)
    assert fit.before == fit.after == 0


def test_the_output_layer_is_found_again() -> None:
    torch.manual_seed(0)
    old, wanted = nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)
    before = old.weight.clone()
    given = [torch.randn(2, 6, 5, 5) for _ in range(8)]
    fit = fit_output(old, ((h, wanted(h).detach()) for h in given), ridge=1e-9)
    assert fit.after < 1e-3 < 0.5 < fit.before
    torch.testing.assert_close(fit.weight, wanted.weight.detach(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(fit.bias, wanted.bias.detach(), atol=1e-4, rtol=1e-4)
    assert torch.equal(old.weight, before)


def test_an_output_layer_that_is_right_already_stays() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 4, 3, padding=1)
    pairs = [(h, conv(h).detach()) for h in torch.randn(24, 1, 6, 5, 5)]
    fit = fit_output(conv, pairs)
    torch.testing.assert_close(fit.weight, conv.weight.detach(), atol=1e-5, rtol=1e-5)
    assert fit.before < 1e-3  # sums of squares in fp32 leave the root of their rounding
    assert fit.after < 1e-3
