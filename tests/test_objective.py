import dataclasses

import pytest
import torch
from tests.oracle import clusters

from recast.errors import Refused
from recast.objective import (
    EPS,
    FLOW,
    OBJECTIVES,
    V_ZSNR,
    X0,
    Discrete,
    Linear,
    Objective,
    V,
    carry,
    express,
    levels,
    retime,
    slopes,
    start,
)

ALL = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
PATHS = pytest.mark.parametrize("path", [Linear(), Discrete(), Discrete(zero_snr=True)], ids=str)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def times(n=4001, low=0.0, high=1.0):
    return torch.linspace(low, high, n, dtype=torch.float64)


@ALL
def test_split_undoes_target(objective):
    """Also at the ends, as far as the prediction says anything there."""
    t = times(2001, low=1e-3)
    x0, eps = normal(len(t), 3), normal(len(t), 3, seed=1)
    x = objective.noise(x0, eps, t)
    found = objective.split(x, objective.target(x0, eps, t), t)
    torch.testing.assert_close(found, (x0, eps), rtol=0, atol=1e-12)


@ALL
def test_the_target_is_what_the_equations_say(objective):
    t = times(11, low=0.1, high=0.9)
    x0, eps = normal(11, 2, 3), normal(11, 2, 3, seed=1)
    alpha, sigma = (level[:, None, None] for level in objective.path(t))
    expected = {
        "eps": eps,
        "x0": x0,
        "v": alpha * eps - sigma * x0,
        "v-zsnr": alpha * eps - sigma * x0,
        "flow": eps - x0,
    }[objective.name]
    torch.testing.assert_close(objective.target(x0, eps, t), expected)
    torch.testing.assert_close(objective.noise(x0, eps, t), alpha * x0 + sigma * eps)


@PATHS
def test_time_undoes_the_path(path):
    t = times()
    alpha, sigma = path(t)
    torch.testing.assert_close(path.time(alpha, sigma), t, rtol=0, atol=1e-12)
    torch.testing.assert_close(path.time(3 * alpha, 3 * sigma), t, rtol=0, atol=1e-12)
    single = path.time(*path(t.float()))
    torch.testing.assert_close(single, t.float(), rtol=0, atol=2e-6)


@PATHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_paths_run_from_data_to_noise(path, dtype):
    alpha, sigma = path(times().to(dtype))
    assert (alpha.diff() < 0).all()
    assert (sigma.diff() >= 0).all()  # float32 cannot tell the last sigmas apart
    assert alpha[0] == 1
    assert sigma[0] == 0
    assert (alpha >= 0).all()
    assert path.covers(alpha, sigma).all()


def test_the_discrete_path_is_stable_diffusions_schedule():
    from diffusers import DDPMScheduler

    schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    k = torch.arange(1000, dtype=torch.float64)
    alpha, sigma = Discrete()((k + 1) / 1000)
    torch.testing.assert_close(alpha.float() ** 2, schedule.alphas_cumprod, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha), rtol=0, atol=1e-15)
    torch.testing.assert_close(Discrete().embed((k + 1) / 1000), k, rtol=0, atol=1e-12)
    assert Discrete().embed(torch.tensor(0.0)) == 0
    assert float(sigma[-1] / alpha[-1]) == pytest.approx(14.6146, abs=1e-3)


def test_zero_terminal_snr_is_the_published_rescale():
    from diffusers import DDIMScheduler

    schedule = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        rescale_betas_zero_snr=True,
    )
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    alpha, sigma = Discrete(zero_snr=True)(t)
    torch.testing.assert_close(alpha.float() ** 2, schedule.alphas_cumprod, rtol=1e-3, atol=1e-6)
    assert alpha[-1] == 0
    assert sigma[-1] == 1
    torch.testing.assert_close(alpha[0], Discrete()(t[:1])[0][0], rtol=0, atol=1e-15)
    snr = (alpha / sigma) ** 2
    assert (snr[:-1] < (Discrete()(t[:-1])[0] / Discrete()(t[:-1])[1]) ** 2 + 1e-9).all()


@pytest.mark.parametrize(("t", "step"), [(0.25, 95), (0.5, 354), (0.75, 673), (0.9, 914)])
def test_the_clock_of_an_eps_network_seen_from_flow(t, step):
    there = retime(torch.tensor(t), FLOW.path, EPS.path)
    assert round(float(EPS.path.embed(there))) == step


def test_an_eps_network_covers_flow_times_up_to_its_own_end():
    ends = retime(torch.tensor([0.001, 1.0], dtype=torch.float64), EPS.path, FLOW.path)
    assert ends.tolist() == pytest.approx([0.0284, 0.9360], abs=1e-4)
    t = torch.tensor([0.01, 0.5, 0.9359, 0.9361, 1.0])
    assert EPS.path.covers(*FLOW.path(t)).tolist() == [True, True, True, False, False]
    assert V_ZSNR.path.covers(*FLOW.path(t)).all()
    assert FLOW.path.covers(*V_ZSNR.path(t)).all()


def test_the_network_is_never_told_a_floored_time():
    t = torch.tensor([0.12345, 0.98765])
    assert FLOW.path.embed(t).tolist() == pytest.approx([123.45, 987.65])
    assert EPS.path.embed(t).tolist() == pytest.approx([122.45, 986.65], abs=1e-3)


@pytest.mark.parametrize("path", [Discrete(zero_snr=True), Linear()], ids=str)
def test_eps_is_refused_where_the_path_ends_in_pure_noise(path):
    with pytest.raises(Refused, match="pure noise"):
        dataclasses.replace(EPS, path=path)
    assert isinstance(dataclasses.replace(X0, path=path), Objective)


@pytest.mark.parametrize("source", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("target", OBJECTIVES.values(), ids=OBJECTIVES)
def test_a_perfect_network_expressed_is_the_perfect_network(source, target):
    oracle = clusters()
    t = times(50, low=0.01, high=0.85)
    x = target.noise(normal(50, 4), normal(50, 4, seed=1), t)
    expressed = express(oracle.net(source), source, target)
    torch.testing.assert_close(expressed(x, t), oracle.net(target)(x, t), rtol=0, atol=1e-10)


def test_above_the_source_x_is_taken_for_noise_without_a_seam():
    net = express(clusters().net(EPS), EPS, FLOW)
    end = retime(torch.ones((), dtype=torch.float64), EPS.path, FLOW.path)
    t = torch.stack([end - 1e-9, end + 1e-9, torch.ones_like(end)])
    x = normal(1, 4).expand(3, 4)
    below, above, last = net(x, t)
    torch.testing.assert_close(below, above, rtol=0, atol=1e-6)
    asked = EPS.path(torch.ones(1, dtype=torch.float64))
    x0, _ = EPS.split(
        asked[1] * x[:1], clusters().net(EPS)(asked[1] * x[:1], torch.ones(1)), torch.ones(1)
    )
    torch.testing.assert_close(last, (x - x0)[0])


def test_carry_keeps_the_sample_and_clamps_above_the_end():
    t = times(40, low=0.0, high=0.93)
    x0, eps = normal(40, 4), normal(40, 4, seed=1)
    there, time = carry(FLOW.noise(x0, eps, t), t, FLOW.path, V.path)
    torch.testing.assert_close(there, V.noise(x0, eps, time), rtol=0, atol=1e-12)
    there, time = carry(eps[:1], torch.ones(1), FLOW.path, V.path)
    assert time.item() == 1
    torch.testing.assert_close(there, start(V.path, eps[:1]))


def test_the_same_eps_starts_every_path_alike():
    eps = normal(2, 3, 4, 4, dtype=torch.float32)
    alpha, sigma = EPS.path(torch.ones((), dtype=torch.float64))
    torch.testing.assert_close(start(EPS.path, eps) / alpha.float(), eps * float(sigma / alpha))
    assert torch.equal(start(FLOW.path, eps), eps)
    assert torch.equal(start(V_ZSNR.path, eps), eps)
    noisy, t = carry(start(FLOW.path, eps), torch.ones(2), FLOW.path, EPS.path)
    torch.testing.assert_close(noisy, start(EPS.path, eps))
    assert t.tolist() == [1, 1]


def test_gradients_pass_through_an_expressed_network():
    scale = torch.ones((), requires_grad=True, dtype=torch.float64)
    net = express(lambda x, t: scale * x, EPS, FLOW)
    net(normal(3, 4), torch.tensor([0.0, 0.5, 1.0]).double()).sum().backward()
    assert torch.isfinite(scale.grad)


@ALL
def test_half_precision_is_computed_in_single(objective):
    t = torch.tensor([0.3, 0.7])
    x0, eps = normal(2, 3, dtype=torch.float16), normal(2, 3, seed=1, dtype=torch.bfloat16)
    assert objective.noise(x0, eps, t).dtype == torch.float32
    x = objective.noise(x0, eps, torch.tensor(0.5))
    assert x.dtype == torch.float32
    assert objective.split(x.half(), x.half(), t)[0].dtype == torch.float32


@ALL
def test_slopes_tell_how_much_of_data_and_noise_a_sample_holds(objective: Objective) -> None:
    x0, eps = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.1, 0.5, 0.8])
    x = objective.noise(x0, eps, t)
    found = slopes(objective.path, x, x0, eps, t)
    assert found == pytest.approx({"data": 1, "noise": 1}, abs=1e-6)
    _, sigma = levels(objective.path, t, x)
    louder = slopes(objective.path, x + 0.5 * sigma * eps, x0, eps, t)
    assert louder == pytest.approx({"data": 1, "noise": 1.5}, abs=1e-6)


def test_slopes_leave_out_what_is_absent() -> None:
    x0, eps = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert slopes(Linear(), eps, x0, eps, torch.ones(3)) == pytest.approx({"noise": 1})
