"""The time embedding learns another clock in closed form."""

import math

import torch
from torch import Tensor, nn

from recast.objective import EPS, FLOW
from recast.train import fit_clock

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
