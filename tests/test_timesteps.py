import pytest
import torch

from recast.errors import Refused
from recast.objective import EPS, FLOW, V_ZSNR, Discrete, Linear
from recast.timesteps import (
    SPACINGS,
    TIMES,
    grid,
    logit_normal,
    piecewise,
    resolution_shift,
    shift,
    stratified,
    stratified_logit_normal,
    uniform,
)

PATHS = pytest.mark.parametrize("path", [Linear(), Discrete(), Discrete(zero_snr=True)], ids=str)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", TIMES)
def test_draws_are_inside_and_repeat(name):
    draw = TIMES[name]
    first = draw(5000, generator=seeded())
    assert first.shape == (5000,)
    assert first.min() > 0
    assert first.max() < 1
    assert torch.equal(first, draw(5000, generator=seeded()))
    assert not torch.equal(first, draw(5000, generator=seeded(1)))


def test_uniform_and_logit_normal_are_what_they_are_called():
    assert uniform(20000, seeded()).mean().item() == pytest.approx(0.5, abs=0.01)
    logits = torch.logit(logit_normal(20000, 0.4, 0.7, seeded()))
    assert logits.mean().item() == pytest.approx(0.4, abs=0.02)
    assert logits.std().item() == pytest.approx(0.7, abs=0.02)
    assert logit_normal(100, 50.0, 1.0, seeded()).max() < 1


def test_stratified_has_one_draw_in_every_cell_in_random_order():
    t = stratified(16, seeded())
    assert sorted((t * 16).floor().int().tolist()) == list(range(16))
    assert (t.diff() < 0).any()


def test_shift_multiplies_the_noise_ratio_and_moves_noising_and_clock_together():
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    moved = shift(t, 2.5)
    torch.testing.assert_close(moved / (1 - moved), 2.5 * t / (1 - t))
    torch.testing.assert_close(FLOW.path.embed(moved) / 1000, FLOW.path(moved)[1])
    torch.testing.assert_close(shift(shift(t, 3), 1 / 3), t)
    assert shift(torch.tensor([0.0, 1.0]), 7).tolist() == [0, 1]
    share = (shift(uniform(100000, seeded()), 2.5) > 0.936).float().mean()
    assert share.item() == pytest.approx(0.146, abs=0.01)
    with pytest.raises(Refused, match="positive"):
        shift(t, 0)


@PATHS
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 7, 250])
def test_grids_fall_strictly_to_zero(path, spacing, steps):
    times = grid(path, steps, spacing=spacing)
    assert times.shape == (steps + 1,)
    assert times[-1] == 0
    assert times[0] <= 1
    assert (times.diff() < 0).all()
    assert times[0] == 1 or spacing == "leading"


def test_flow_grid_is_that_of_diffusers():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / 25, 25).tolist())
    ours = grid(FLOW.path, 25, shift=3.0)
    torch.testing.assert_close(ours.float(), scheduler.sigmas, rtol=0, atol=1e-6)
    embedded = FLOW.path.embed(ours[:-1]).float()
    torch.testing.assert_close(embedded, scheduler.timesteps, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("spacing", "theirs"),
    [("normal", "linspace"), ("leading", "leading"), ("trailing", "trailing")],
)
def test_step_grids_are_those_of_diffusers(spacing, theirs):
    from diffusers import EulerDiscreteScheduler

    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing=theirs,
        steps_offset=1,
    )
    scheduler.set_timesteps(25)
    ours = EPS.path.embed(grid(EPS.path, 25, spacing=spacing)[:-1])
    torch.testing.assert_close(ours.float(), scheduler.timesteps.float(), rtol=0, atol=1e-3)


def test_karras_grid_is_that_of_k_diffusion():
    """sigma_i = (max^(1/7) + i/(n-1) (min^(1/7) - max^(1/7)))^7, restated."""
    alpha, sigma = EPS.path(grid(EPS.path, 10, spacing="karras")[:-1])
    ramp = torch.linspace(0, 1, 10, dtype=torch.float64)
    high, low = (sigma / alpha)[0] ** (1 / 7), (sigma / alpha)[-1] ** (1 / 7)
    torch.testing.assert_close(sigma / alpha, (high + ramp * (low - high)) ** 7)
    assert EPS.path.embed(EPS.path.time(alpha, sigma))[[0, -1]].tolist() == pytest.approx([999, 0])


def test_each_path_has_its_default_and_unknown_ones_are_refused():
    assert torch.equal(grid(V_ZSNR.path, 5), grid(FLOW.path, 5))
    assert grid(EPS.path, 5)[-2].item() == pytest.approx(0.001)
    with pytest.raises(Refused, match="normal"):
        grid(EPS.path, 5, spacing="nromal")
    with pytest.raises(Refused, match="at least 1"):
        grid(EPS.path, 0)


def test_stratified_logit_normal_is_logit_normal_with_less_variance():
    t = stratified_logit_normal(4000, 0.4, 0.7, seeded())
    logits = torch.logit(t.double())
    assert logits.mean().item() == pytest.approx(0.4, abs=0.005)
    assert logits.std().item() == pytest.approx(0.7, abs=0.01)
    assert (t.diff() < 0).any()
    means = [stratified_logit_normal(8, generator=seeded(k)).mean() for k in range(200)]
    free = [logit_normal(8, generator=seeded(k)).mean() for k in range(200)]
    assert torch.stack(means).std() < torch.stack(free).std() / 3


def test_the_shift_of_a_resolution_is_sd3s():
    assert resolution_shift(1024 * 1024, 512) == pytest.approx(2)
    assert resolution_shift(512 * 512, 512) == 1
    assert resolution_shift(1024 * 256, 512) == 1
    assert resolution_shift(12345, 0) == 1


def test_a_piecewise_curve_is_numpys():
    import numpy as np

    points = [[0.1, 2.0], [0.4, 0.0], [0.5, 1.0], [0.9, 0.25]]
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    wanted = np.interp(t.numpy(), *zip(*points, strict=True))
    torch.testing.assert_close(piecewise(points)(t), torch.from_numpy(wanted))
    assert piecewise(points)(t.float()).dtype == torch.float32
    assert piecewise(0.3)(t).unique().tolist() == [0.3]
    assert piecewise([[0.5, 0.7]])(t).unique().tolist() == [0.7]
