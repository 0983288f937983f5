"""A single file beside its configuration folder, in plain diffusers, paints what recast paints."""

from pathlib import Path

import pytest
import torch
from tests import tiny

from recast.checkpoint import Checkpoint
from recast.layout import detect
from recast.model import open_model
from recast.model.folder import write_config_folder
from recast.objective import FLOW
from recast.sample import sample_images

PROMPT, SEED, STEPS, SCALE = "a big red star", 5, 4, 3.0


def pipeline(family: str, file: Path, config: Path):
    import diffusers

    cls = {
        "sdxl": diffusers.StableDiffusionXLPipeline,
        "sd15": diffusers.StableDiffusionPipeline,
    }[family]
    pipe = cls.from_single_file(
        str(file), config=str(config), local_files_only=True, torch_dtype=torch.float32
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("family", ["sdxl", "sd15"])
def test_diffusers_paints_the_same_flow_picture(family: str, tmp_path: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    file = tiny.checkpoint(tmp_path / "model.safetensors", family, vocabulary=49408)
    with Checkpoint(file) as checkpoint:
        write_config_folder(detect(checkpoint), tmp_path / "diffusers")
    model = open_model(file, objective="flow")
    ours = next(
        sample_images(model, [PROMPT], seeds=[SEED], steps=STEPS, scale=SCALE, size=(64, 64))
    ).image

    pipe = pipeline(family, file, tmp_path / "diffusers")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1)
    pipe.scheduler.init_noise_sigma = 1.0
    pipe.scheduler.scale_model_input = lambda sample, timestep=None: sample
    latents = torch.randn(
        (1, *model.latent_shape((64, 64))), generator=torch.Generator().manual_seed(SEED)
    )
    theirs = pipe(
        PROMPT, latents=latents, num_inference_steps=STEPS, guidance_scale=SCALE, height=64,
        width=64, sigmas=[1 - k / STEPS for k in range(STEPS)], output_type="pt",
    ).images[0]  # fmt: skip
    gap = ((ours + 1) / 2 - theirs).abs()
    assert FLOW.name == model.objective.name
    assert gap.mean() < 0.1 / 255
    assert theirs.std() > 0.01
