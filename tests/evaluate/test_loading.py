"""The lines that the report prints for diffusers give plain Euler on the linear path."""

import pytest
import torch

from recast.evaluate.loading import FLOW_LINES, how_to_load


@pytest.mark.parametrize("shift", [1.0, 2.5])
def test_the_flow_lines_make_the_pipeline_s_scheduler_plain_euler(shift: float) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    class Pipe:
        scheduler = None

    pipe = Pipe()
    for line in FLOW_LINES:
        exec(line.format(shift=shift), {"FlowMatchEulerDiscreteScheduler": FlowMatchEulerDiscreteScheduler, "pipe": pipe})  # fmt: skip # noqa: E501
    scheduler = pipe.scheduler
    assert scheduler is not None
    scheduler.set_timesteps(sigmas=[1 - k / 25 for k in range(25)])
    even = 1 - torch.arange(26) / 25
    expected = shift * even / (1 + (shift - 1) * even)
    assert torch.allclose(scheduler.sigmas, expected, atol=1e-6)
    assert torch.allclose(scheduler.timesteps, 1000 * expected[:-1], atol=1e-3)

    x = (
        torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
        * scheduler.init_noise_sigma
    )
    mine = x.clone()
    for t, a, b in zip(scheduler.timesteps, expected, expected[1:], strict=False):
        velocity = torch.sin(scheduler.scale_model_input(x, t))
        x = scheduler.step(velocity, t, x).prev_sample
        mine = mine + (b - a) * torch.sin(mine)
    assert torch.allclose(x, mine, atol=1e-5)


def test_steps_of_the_printed_grid_are_even() -> None:
    assert "sigmas=[1 - k / 25 for k in range(25)]" in how_to_load("sdxl", "flow", "m")[1].code
