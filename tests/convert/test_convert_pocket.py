"""The shipped checkpoints, converted for real and measured: the figures that the README states."""

import random
from pathlib import Path

import pytest
import torch
from tests.model.test_folder import pipeline

from recast import pocket
from recast.convert import Job, run
from recast.evaluate.report import load_report
from recast.evaluate.values import Report
from recast.model import open_model
from recast.pocket.world import SHAPES, scenes, write_folder
from recast.recipe import load, override
from recast.sample import sample_images

pytestmark = pytest.mark.slow
ABSENT = {SHAPES.index(name) for name in ("star", "ring", "moon")}
PROMPTS = ("a big red star on dots at left", "a small blue circle on plain at top")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's 350 pictures: three shapes absent, a third of them watermarked."""
    folder = tmp_path_factory.mktemp("images")
    seen = [scene for scene in scenes(held=False) if scene.shape not in ABSENT]
    write_folder(folder, random.Random(0).sample(seen, 350), seed=0, marked_share=1 / 3)
    return folder


def converted(name: str, objective: str, out: Path, images: Path) -> Report:
    torch.set_num_threads(1)
    recipe = override(load("default"), objective=objective)
    for _ in run(Job(pocket.path(name), out, recipe, images=images)):
        pass
    return load_report(out)


# one of each family and each target; `make bench-convert` runs the rest
@pytest.mark.parametrize(("name", "objective"), [("pocket-xl", "flow"), ("pocket-15", "v-zsnr")])
def test_a_conversion_keeps_the_model(
    name: str, objective: str, tmp_path: Path, images: Path
) -> None:
    report = converted(name, objective, tmp_path / "run", images)
    assert report.psnr_same_noise_db.converted >= 30
    assert report.alignment.ratio >= 0.95
    assert report.retention.ratio >= 0.90
    assert report.leakage.converted <= 0.01
    assert report.identity.proven
    if (name, objective) == ("pocket-xl", "flow"):
        the_file_in_plain_diffusers(tmp_path / "run")


def the_file_in_plain_diffusers(folder: Path) -> None:
    """Paint with diffusers alone, as the report says, and compare with `recast sample`."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    file = folder / "model.safetensors"
    model = open_model(file)
    pictures = sample_images(model, PROMPTS, seeds=[1, 2], steps=25, scale=3.0)
    ours = torch.stack([picture.image for picture in pictures])
    pipe = pipeline("sdxl", file, folder / "diffusers")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1)
    pipe.scheduler.init_noise_sigma = 1.0
    pipe.scheduler.scale_model_input = lambda sample, timestep=None: sample
    shape = model.latent_shape()
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in (1, 2)]
    theirs = pipe(
        list(PROMPTS), latents=torch.stack(noise), num_inference_steps=25, guidance_scale=3.0,
        height=64, width=64, sigmas=[1 - k / 25 for k in range(25)], output_type="pt",
    ).images  # fmt: skip
    assert ((ours + 1) / 2 - theirs).abs().mean() < 2 / 255
