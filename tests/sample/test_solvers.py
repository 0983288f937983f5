"""Solvers against the analytic denoiser, against k-diffusion's formulas and against diffusers."""

import math
from itertools import pairwise

import pytest
import torch
from tests.oracle import clusters, exact, gaussian

from recast.errors import Refused
from recast.objective import (
    EPS,
    FLOW,
    OBJECTIVES,
    V_ZSNR,
    Discrete,
    Linear,
    express,
    levels,
    retime,
    start,
)
from recast.sample import SOLVERS, plain
from recast.sample.solvers import find_solver
from recast.timesteps import grid

ODE = ["euler", "ddim", "heun", "dpmpp_2m"]
SDE = ["euler_ancestral", "dpmpp_2s_ancestral", "dpmpp_2m_sde"]
PATHS = pytest.mark.parametrize("path", [Linear(), Discrete(), Discrete(zero_snr=True)], ids=str)


class Exploding:
    """The variance-exploding path of Karras et al.: alpha = 1, sigma = 80 t."""

    floor, spacing = 0.0, "trailing"

    def __call__(self, t):
        return torch.ones_like(t), 80 * t

    def time(self, alpha, sigma):
        return sigma / alpha / 80


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def solve(name, denoise, path, x, times, seed=0):
    generator = torch.Generator().manual_seed(seed)
    *_, end = SOLVERS[name](denoise, path, x, times, generator=generator)
    return end


@PATHS
@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_every_solver_runs_from_noise_to_data(path, name, steps):
    """From alpha = 0, where that is the start, to sigma = 0, without a NaN."""
    x = start(path, randn(6, 4).float())
    states = list(SOLVERS[name](clusters().denoiser(path), path, x, grid(path, steps)))
    assert len(states) == steps
    assert all(torch.isfinite(state).all() for state in states)


@PATHS
@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_the_ode_solvers_converge_at_their_order(path, name, order):
    oracle, x = gaussian(), start(path, randn(8, 4))
    errors = []
    for n in (40, 80, 160):
        times = torch.linspace(1, 0.3, n + 1, dtype=torch.float64)
        end = solve(name, oracle.denoiser(path), path, x, times)
        errors.append((end - exact(oracle, path, x, times[0], times[-1])).abs().max().item())
    assert errors[-1] < 0.04 / 10**order
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25)
    assert math.log2(errors[1] / errors[2]) == pytest.approx(order, abs=0.25)


@PATHS
@pytest.mark.parametrize("name", ODE)
def test_the_ode_solvers_end_where_the_ode_ends(path, name):
    oracle, x, times = gaussian(), start(path, randn(8, 4)), grid(path, 400)
    end = solve(name, oracle.denoiser(path), path, x, times)
    torch.testing.assert_close(end, exact(oracle, path, x, times[0], times[-1]), rtol=0, atol=0.02)


@PATHS
@pytest.mark.parametrize("name", ODE)
def test_the_ode_solvers_agree_on_a_mixture(path, name):
    oracle, x = clusters(), start(path, randn(8, 4))
    reference = solve("heun", oracle.denoiser(path), path, x, grid(path, 900))
    end = solve(name, oracle.denoiser(path), path, x, grid(path, 300))
    assert (end - reference).abs().max() < 0.05


@PATHS
@pytest.mark.parametrize("name", SDE)
def test_the_ancestral_solvers_draw_from_the_data(path, name):
    oracle, x = gaussian(), start(path, randn(4000, 4))
    end = solve(name, oracle.denoiser(path), path, x, grid(path, 200))
    torch.testing.assert_close(end.mean(0), oracle.means[0], rtol=0, atol=0.05)
    assert end.std(0).sub(0.4).abs().max() < 0.05


def test_ddim_on_the_linear_path_is_eulers_method_for_flow():
    net, x, times = clusters().net(FLOW), randn(8, 4), grid(FLOW.path, 20, shift=2.0)
    ours = solve("ddim", plain(net, FLOW), FLOW.path, x, times)
    for t, s in pairwise(times):
        x = x + (s - t) * net(x, t.expand(8))
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-12)


def test_heun_on_the_linear_path_is_heuns_method_for_flow():
    net, x, times = clusters().net(FLOW), randn(8, 4), grid(FLOW.path, 20)
    ours = solve("heun", plain(net, FLOW), FLOW.path, x, times)
    for t, s in pairwise(times):
        velocity = net(x, t.expand(8))
        ahead = x + (s - t) * velocity
        x = x + (s - t) * (velocity + net(ahead, s.expand(8))) / 2 if s > 0 else ahead
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", SOLVERS)
def test_one_network_samples_the_same_image_under_every_objective(name):
    """Matched signal-to-noise grids, the same noise, five objectives, one eps network."""
    flow_times = torch.cat([torch.linspace(0.93, 0.03, 12).double(), torch.zeros(1)])
    eps, net = randn(6, 4), clusters().net(EPS)
    ends = []
    for objective in OBJECTIVES.values():
        times = retime(flow_times, FLOW.path, objective.path)
        x = start(objective.path, eps, times[0].item())
        denoise = plain(express(net, EPS, objective), objective)
        ends.append(solve(name, denoise, objective.path, x, times))
    assert len(ends) == 5
    if name == "heun":  # its trapezoid is taken in the path's own coordinates
        ends = [ends[i] for i in (0, 1, 4)]
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=0, atol=1e-10)


def k_diffusion(name, model, y, sigmas, generator):
    """k-diffusion's samplers restated: y = x/alpha, model(y, sigma) -> denoised."""

    def ancestral(s, s_next):
        up = min(s_next, math.sqrt(s_next**2 * (s**2 - s_next**2) / s**2))
        return math.sqrt(s_next**2 - up**2), up

    def fresh():
        return torch.randn(y.shape, generator=generator).double()

    before = h_before = None
    for s, s_next in pairwise(sigmas):
        denoised = model(y, s)
        d = (y - denoised) / s
        if name == "euler":
            y = y + d * (s_next - s)
        elif name == "heun":
            ahead = y + d * (s_next - s)
            if s_next > 0:
                d = (d + (ahead - model(ahead, s_next)) / s_next) / 2
            y = y + d * (s_next - s)
        elif name == "euler_ancestral":
            down, up = ancestral(s, s_next)
            y = y + d * (down - s)
            y = y + fresh() * up if s_next > 0 else y
        elif name == "dpmpp_2s_ancestral":
            down, up = ancestral(s, s_next)
            if down == 0:
                y = y + d * (down - s)
            else:
                h = math.log(s) - math.log(down)
                middle = math.exp(-(-math.log(s) + h / 2))
                y2 = middle / s * y - math.expm1(-h / 2) * denoised
                y = down / s * y - math.expm1(-h) * model(y2, middle)
            y = y + fresh() * up if s_next > 0 else y
        elif s_next == 0:
            y = denoised
        else:
            h = math.log(s) - math.log(s_next)
            r = h_before / h if before is not None else None
            if name == "dpmpp_2m":
                mix = denoised if r is None else (1 + 1 / (2 * r)) * denoised - before / (2 * r)
                y = s_next / s * y - math.expm1(-h) * mix
            else:
                y = s_next / s * math.exp(-h) * y - math.expm1(-2 * h) * denoised
                if r is not None:
                    y = y - 0.5 * math.expm1(-2 * h) / r * (denoised - before)
                y = y + fresh() * s_next * math.sqrt(-math.expm1(-2 * h))
            before, h_before = denoised, h
    return y


ON_BOTH = [name for name in SOLVERS if name not in ("ddim", "heun")]


@pytest.mark.parametrize(
    ("name", "path"),
    [(name, path) for name in ON_BOTH for path in (Exploding(), Discrete())]
    + [("heun", Exploding())],  # its trapezoid is taken in x, theirs in x/alpha
)
def test_solvers_are_k_diffusions(name, path):
    """Also on Stable Diffusion's own path, in other coordinates."""
    times = grid(path, 14, spacing="trailing")
    alpha, sigma = path(times)
    oracle, x = clusters(), start(path, randn(6, 4))
    one = torch.ones(1, 1, dtype=torch.float64)
    theirs = k_diffusion(
        name,
        lambda y, s: oracle.posterior(y, one, s * one)[0],
        x / alpha[0],
        (sigma / alpha).tolist(),
        torch.Generator().manual_seed(3),
    )
    ours = solve(name, oracle.denoiser(path), path, x, times, seed=3)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def toy(x, t):
    """Something smooth that depends on the number it is told."""
    return torch.tanh(x.roll(1, -1) + 0.3 * x) * (1 + t.reshape(-1, 1, 1, 1) / 1000)


def test_euler_on_flow_is_diffusers():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.5)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / 12, 12).tolist())
    x = theirs = randn(2, 3, 4, 4).float()
    for t in scheduler.timesteps:
        theirs = scheduler.step(toy(theirs, t.expand(2)), t, theirs, return_dict=False)[0]
    net = plain(lambda x, t: toy(x, FLOW.path.embed(t)), FLOW)
    ours = solve("euler", net, FLOW.path, x, grid(FLOW.path, 12, shift=2.5))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_euler_on_eps_is_diffusers():
    """28 steps, so that "linspace" falls on whole steps, where no interpolation differs."""
    from diffusers import EulerDiscreteScheduler

    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="linspace",
    )
    scheduler.set_timesteps(28)
    eps = randn(2, 3, 4, 4).float()
    theirs = eps * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        output = toy(scheduler.scale_model_input(theirs, t), t.expand(2))
        theirs = scheduler.step(output, t, theirs, return_dict=False)[0]
    net = plain(lambda x, t: toy(x, EPS.path.embed(t)), EPS)
    ours = solve("euler", net, EPS.path, start(EPS.path, eps), grid(EPS.path, 28))
    torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)


def test_shift_moves_the_sample_and_what_the_network_is_told_together():
    """Whatever the shift, x is exactly as noisy as the network hears."""
    x0 = torch.full((1, 1), 0.3, dtype=torch.float64)
    for t_shift in (1.0, 2.5):
        asked = []

        def net(x, t, asked=asked):
            alpha, sigma = levels(FLOW.path, t, x)
            asked.append((FLOW.path.embed(t).item() / 1000, ((x - alpha * x0) / sigma).item()))
            return (x - x0) / sigma

        eps = torch.ones(1, 1, dtype=torch.float64)
        end = solve("euler", plain(net, FLOW), FLOW.path, eps, grid(FLOW.path, 8, shift=t_shift))
        assert [t for t, _ in asked] == pytest.approx(grid(FLOW.path, 8, shift=t_shift)[:-1])
        assert [noise for _, noise in asked] == pytest.approx([1.0] * 8)
        torch.testing.assert_close(end, x0)


@pytest.mark.parametrize("name", SDE)
def test_noise_per_image_does_not_depend_on_the_batch(name):
    def run(rows):
        generators = [torch.Generator().manual_seed(10 + row) for row in rows]
        x = torch.stack([torch.randn(4, generator=each) for each in generators])
        denoise, times = clusters().denoiser(V_ZSNR.path), grid(V_ZSNR.path, 6)
        *_, end = SOLVERS[name](denoise, V_ZSNR.path, x, times, generator=generators)
        return end

    torch.testing.assert_close(run([0, 1, 2])[1:], run([1, 2]))


def test_bad_names_and_grids_are_refused():
    with pytest.raises(Refused, match="dpmpp_2m"):
        find_solver("dpm++")
    with pytest.raises(Refused, match="fall"):
        solve("euler", clusters().denoiser(Linear()), Linear(), randn(1, 4), torch.zeros(3))
