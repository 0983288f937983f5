"""Distances are per sample, what their formulas say, and fft is not mse in disguise."""

import pytest
import torch
from tests.train.tiny_run import draw
from torch import Tensor

from recast.objective import EPS, FLOW, V_ZSNR
from recast.train import DISTANCES, HUBERS, criterion, from_data
from recast.train.loss import fft, huber, l1, mse


@pytest.mark.parametrize("name", DISTANCES)
def test_distances_are_per_sample_and_zero_at_home(name: str) -> None:
    a, b = torch.randn(2, 3, 4, 8, 8, requires_grad=True)
    measure = DISTANCES[name].measure
    d = measure(a, b)
    assert d.shape == (3,)
    assert (d > 0).all()
    assert torch.equal(measure(a, a), torch.zeros(3))
    alone = measure(a[1:2], b[1:2])
    assert torch.allclose(alone[0], d[1])
    (grad,) = torch.autograd.grad(measure(a, a.detach()).sum() + d.sum(), a, retain_graph=True)
    assert torch.isfinite(grad).all()


def test_formulas() -> None:
    a, b = torch.tensor([[[[3.0, 0.0]]]]), torch.zeros(1, 1, 1, 2)
    assert mse(a, b).item() == 4.5
    assert l1(a, b).item() == 1.5
    assert huber(a, b, c=4).item() == pytest.approx(2 * 4 * (5 - 4) / 2)
    tiny = a * 1e-3
    assert huber(tiny, b).item() == pytest.approx(mse(tiny, b).item(), rel=1e-3)


def test_fft_is_not_mse() -> None:
    a, b = torch.randn(2, 6, 4, 8, 8, dtype=torch.float64)
    difference = torch.fft.fft2(a - b, norm="ortho")
    parseval = (difference.real**2 + difference.imag**2).flatten(1).mean(1)
    assert torch.allclose(parseval, mse(a, b))  # the complex error would have been
    ratio = fft(a, b) / mse(a, b)
    assert (ratio < 0.8).all()
    moved = a.roll(1, -1)  # same magnitudes, other phases
    assert torch.allclose(fft(a, moved, phase=0), torch.zeros(6, dtype=a.dtype))
    assert (fft(a, moved) > 0.05).all()


@pytest.mark.parametrize("objective", [EPS, V_ZSNR, FLOW], ids=lambda o: o.name)
def test_fft_of_x0_weighs_noise_levels_like_outputs(objective) -> None:
    """The same error in the output costs about the same at every level where 0.1 does not bind."""
    d = draw(0, objective, n=32, size=8)
    loss = criterion(from_data(objective), objective, DISTANCES["fft"])
    target = objective.target(d.x0, d.eps, d.t)
    cost = loss(lambda d: target + torch.randn_like(target), d).distance
    plain = mse(target + torch.randn_like(target), target)
    _, sigma = objective.path(d.t)
    strong = sigma > 0.3
    assert cost[strong].max() / cost[strong].min() < 12
    assert (cost < 3 * plain).all()


def test_weights_act_on_each_sample() -> None:
    d = draw(0)

    def weighting(alpha: Tensor, sigma: Tensor, objective: object) -> Tensor:
        assert torch.equal(sigma, d.t)
        return sigma / alpha

    seen = criterion(from_data(FLOW), FLOW, weighting=weighting)(lambda d: torch.zeros_like(d.x), d)
    assert torch.allclose(seen.distance, (d.eps - d.x0).square().flatten(1).mean(1))
    assert torch.allclose(seen.weighted, seen.distance * d.t / (1 - d.t))


def test_losses_are_fp32_whatever_the_network_runs_in() -> None:
    d = draw(0)
    loss = criterion(from_data(FLOW), FLOW)
    seen = loss(lambda d: d.x.bfloat16(), d)
    assert seen.weighted.dtype == torch.float32


def test_huber_takes_one_scale_per_sample() -> None:
    a, b = torch.randn(2, 3, 4, 8, 8)
    c = torch.tensor([0.01, 0.1, 2.0])
    each = [huber(a[i : i + 1], b[i : i + 1], c=c[i].item()) for i in range(3)]
    assert torch.allclose(huber(a, b, c), torch.cat(each))


@pytest.mark.parametrize("objective", [EPS, V_ZSNR, FLOW], ids=lambda o: o.name)
def test_huber_schedules_fall_from_one_to_c(objective) -> None:
    t = torch.linspace(0, 1, 1001)
    for schedule in ("exponential", "snr"):
        scale = HUBERS[schedule](0.1).scale(objective.path, t)
        assert (scale.diff() <= 1e-7).all()
        assert scale[0] == pytest.approx(1, abs=1e-5)
        assert scale[-1] == pytest.approx(0.1, abs=0.01)
    assert HUBERS["constant"](0.1).scale is None


def test_huber_schedules_are_kohyas() -> None:
    """exp(-k (-log c)/1000) and (1 - c)/(1 + sigma_k)² + c of the step k, restated."""
    k = torch.arange(1000, dtype=torch.float64)
    t = (k + 1) / 1000
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    ab = (1 - beta).cumprod(0)
    theirs = 0.9 / (1 + ((1 - ab) / ab).sqrt()) ** 2 + 0.1
    torch.testing.assert_close(HUBERS["snr"](0.1).scale(EPS.path, t), theirs)
    theirs = torch.exp(-k * -torch.log(torch.tensor(0.1, dtype=torch.float64)) / 1000)
    torch.testing.assert_close(HUBERS["exponential"](0.1).scale(EPS.path, t), theirs)


def test_the_criterion_asks_for_the_scale_of_each_draw() -> None:
    d = draw(0)
    net = lambda d: torch.zeros_like(d.x)  # noqa: E731
    seen = criterion(from_data(FLOW), FLOW, HUBERS["snr"](0.1))(net, d)
    c = 0.9 * (1 - d.t).square() + 0.1
    assert torch.allclose(seen.distance, huber(torch.zeros_like(d.x), d.eps - d.x0, c))


def test_bands_weigh_waves_by_their_length() -> None:
    flat, board = torch.ones(1, 1, 8, 8), torch.ones(1, 1, 8, 8)
    board[..., ::2, 1::2] = board[..., 1::2, ::2] = -1
    zero = torch.zeros_like(flat)
    assert fft(flat, zero, bands=[0, 1]).item() == pytest.approx(0, abs=1e-9)
    assert fft(board, zero, bands=[1, 0]).item() == pytest.approx(0, abs=1e-9)
    assert fft(board, zero, bands=[1, 3]) == pytest.approx(3 * fft(board, zero).item())
    a, b = torch.randn(2, 3, 4, 6, 10)
    torch.testing.assert_close(fft(a, b, bands=[2, 2, 2]), 2 * fft(a, b))


def test_a_curve_is_one_more_weight() -> None:
    d = draw(0)
    plain = criterion(from_data(FLOW), FLOW)(lambda d: torch.zeros_like(d.x), d)
    seen = criterion(from_data(FLOW), FLOW, curve=lambda t: 3 * t)(
        lambda d: torch.zeros_like(d.x), d
    )
    assert torch.allclose(seen.weighted, 3 * d.t * plain.distance)
    assert torch.equal(seen.distance, plain.distance)
