"""Targets, distances of blocks, the data contract."""

import pytest
import torch

from recast.distill.losses import (
    LocalHeads,
    block_term,
    check_forward,
    expressed,
    kd_pooled,
    kd_spatial,
    target,
)
from recast.errors import Refused
from recast.objective import EPS, FLOW, V

torch.manual_seed(0)
X0, NOISE = torch.randn(6, 4, 8, 8), torch.randn(6, 4, 8, 8)
T = torch.tensor([0.02, 0.2, 0.5, 0.7, 0.9, 0.99])


def net(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return 0.3 * x.roll(1, -1) + t.view(-1, 1, 1, 1)


def test_teacher_v_is_the_published_formula() -> None:
    x = V.noise(X0, NOISE, T)
    alpha, sigma = (c.view(-1, 1, 1, 1) for c in V.path(T))
    answer = expressed(net, EPS, V)(x, T)
    assert torch.allclose(answer, (net(x, T) - sigma * x) / alpha, rtol=1e-3, atol=1e-4)
    value, weight = target(answer, x, X0, NOISE, T, source=EPS, objective=V)
    assert torch.equal(value, answer)
    assert weight.tolist() == pytest.approx((alpha.flatten() ** 2 / 0.05).clamp(max=1).tolist())
    assert weight[-1] < 0.2
    free = target(answer, x, X0, NOISE, T, source=EPS, objective=V, control=False)[1]
    assert torch.equal(free, torch.ones(6))


def test_data_targets_need_no_teacher_and_flow_is_eps_less_data() -> None:
    nothing = torch.full_like(X0, torch.nan)
    x = FLOW.noise(X0, NOISE, T)
    value, weight = target(nothing, x, X0, NOISE, T, source=EPS, objective=FLOW, share=0.0)
    assert torch.allclose(value, NOISE - X0)
    assert torch.equal(weight, torch.ones(6))


def test_above_the_teachers_range_the_data_takes_over() -> None:
    x = FLOW.noise(X0, NOISE, T)
    answer = torch.zeros_like(x)
    value, weight = target(answer, x, X0, NOISE, T, source=EPS, objective=FLOW)
    assert torch.allclose(value[-1], NOISE[-1] - X0[-1])
    assert weight[-1] == 1
    assert not value[:-1].any()


def test_a_mix_has_the_gradient_of_both_losses() -> None:
    x, s = V.noise(X0, NOISE, T), 0.3
    answer = torch.randn_like(x)
    value, weight = target(answer, x, X0, NOISE, T, source=EPS, objective=V, share=s)
    output = torch.randn_like(x, requires_grad=True)
    heard = (V.path(T)[0] ** 2 / 0.05).clamp(max=1).view(-1, 1, 1, 1)
    both = s * heard * (output - answer) ** 2 + (1 - s) * (output - V.target(X0, NOISE, T)) ** 2
    (wanted,) = torch.autograd.grad(both.sum(), output)
    one = weight.view(-1, 1, 1, 1) * (output - value) ** 2
    (got,) = torch.autograd.grad(one.sum(), output)
    assert torch.allclose(wanted, got, atol=1e-4)


def test_distances_of_blocks() -> None:
    a = {"down_0": torch.randn(3, 5, 4, 4), "mid": torch.randn(3, 6, 2, 2)}
    same = {name: 2 * f for name, f in a.items()}
    for kd in (kd_pooled, kd_spatial):
        assert kd(a, same).abs().max() < 1e-6
        assert kd(a, {n: -f for n, f in a.items()}).sub(2).abs().max() < 1e-6
        assert kd(a, same).shape == (3, 2)
    shuffled = {n: f.flip(-1, -2) for n, f in a.items()}
    assert kd_pooled(a, shuffled).max() < 1e-6 < 0.1 < kd_spatial(a, shuffled).min()
    with pytest.raises(Refused, match="no block mid"):
        kd_pooled({"down_0": a["down_0"]}, a)


def test_the_block_term_and_the_published_share() -> None:
    kd = torch.full((4, 9), 0.07 / 0.25 / 8.6)
    term = block_term(torch.full((9,), 8.6 / 9), kd)
    assert term.item() == pytest.approx(0.07)
    # S5's own loss, 0.23 + 0.05 * 0.07: the block term is 1.5 % of it
    assert 0.05 * term.item() / (0.23 + 0.05 * term.item()) == pytest.approx(0.015, abs=5e-4)
    local = torch.ones(4, 9)
    more = block_term(torch.ones(9), kd, local, local_weight=0.5)
    assert more.item() == pytest.approx(block_term(torch.ones(9), kd).item() + 4.5)


def test_local_heads_learn() -> None:
    features = {"mid": torch.randn(8, 6, 4, 4)}
    heads = LocalHeads({"mid": 6})
    wanted = torch.nn.functional.interpolate(features["mid"][:, :4], scale_factor=2)
    before = heads(features, wanted)
    assert before.shape == (8, 1)
    step = torch.optim.Adam(heads.parameters(), 0.05)
    for _ in range(60):
        step.zero_grad()
        heads(features, wanted).mean().backward()
        step.step()
    assert heads(features, wanted).mean() < 0.1 * before.mean()


def test_the_data_contract() -> None:
    check_forward(V.noise(X0, NOISE, T), X0, NOISE, T, path=V.path)
    alpha, sigma = (c.view(-1, 1, 1, 1) for c in V.path(T))
    with pytest.raises(Refused, match="times the data"):
        check_forward(torch.randn_like(X0), X0, NOISE, T, path=V.path)
    with pytest.raises(Refused, match="times the data"):
        check_forward(1.03 * alpha * X0 + sigma * NOISE, X0, NOISE, T, path=V.path)
    check_forward(1.015 * alpha * X0 + sigma * NOISE, X0, NOISE, T, path=V.path)
    with pytest.raises(Refused, match="path"):
        check_forward(V.noise(X0, NOISE, T), X0, NOISE, T, path=FLOW.path)
    with pytest.raises(Refused, match="no latent source"):
        check_forward(sigma * NOISE, torch.zeros_like(X0), NOISE, T, path=V.path)
