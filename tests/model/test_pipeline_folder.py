"""Folders that Recast writes: back to the same file, and diffusers paints what `sample` paints."""

import json
from pathlib import Path

import pytest
import torch
from tests import tiny

from recast import commit as committing
from recast import pocket
from recast.adapter import read_adapter
from recast.adapter.rebuild import refuse_other_base
from recast.adapter.split import split
from recast.checkpoint import Checkpoint
from recast.commit import valid_folder
from recast.errors import Refused
from recast.layout import detect, open_checkpoint
from recast.markers import marker_specs, read_objective, stamp
from recast.model import open_model
from recast.model.folder import through_file, write_beside, write_file, write_folder
from recast.sample import sample_images

PIPELINES = {"sdxl": "StableDiffusionXLPipeline", "sd15": "StableDiffusionPipeline"}
PROMPT = "a big red star on dots at left"


def written(source: Path, out: Path, **options: str) -> Path:
    with open_checkpoint(source) as checkpoint:
        write_folder(checkpoint, out, **options)
    return out


@pytest.mark.parametrize("name", pocket.NAMES)
def test_a_shipped_file_comes_back_byte_for_byte(name: str, tmp_path: Path) -> None:
    source = pocket.path(name)
    folder = written(source, tmp_path / "folder")
    assert valid_folder(folder)
    with Checkpoint(source) as file, open_checkpoint(folder) as found:
        assert list(found) == list(file)
        assert found.metadata == {**file.metadata, "recast.scheduler": "eps"}
        assert all(found.raw(key) == file.raw(key) for key in file)
        assert found.specs == file.specs
        write_file(found, tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == source.read_bytes()
    assert not list(tmp_path.rglob("*recast-tmp"))


@pytest.mark.parametrize(
    ("objective", "dtype"), [("eps", "BF16"), ("v-zsnr", "F16"), ("flow", "F16")]
)
def test_markers_and_header_come_back(objective: str, dtype: str, tmp_path: Path) -> None:
    said = stamp({"ss_steps": "3"}, objective, family="sdxl")
    source = tiny.checkpoint(tmp_path / "a.safetensors", "sdxl", dtype=dtype, metadata=said)
    with Checkpoint(source) as file:
        write_file(file, tmp_path / "m.safetensors", objective=objective)
    folder = written(tmp_path / "m.safetensors", tmp_path / "folder")
    with Checkpoint(tmp_path / "m.safetensors") as file, open_checkpoint(folder) as found:
        evidence = read_objective(found.specs, found.metadata)
        assert (evidence.objective, evidence.contradictions) == (objective, ())
        assert set(marker_specs(objective)) <= set(found)
        assert dict(found.metadata) == {**file.metadata, "recast.scheduler": objective}
        assert {key: found.raw(key) for key in found} == {key: file.raw(key) for key in file}
        assert found.sha256() == file.sha256()


def test_the_objective_of_a_folder_goes_into_the_file(tmp_path: Path) -> None:
    source = tiny.checkpoint(tmp_path / "a.safetensors", "sd15")
    folder = written(source, tmp_path / "folder")
    (folder / "recast.safetensors").unlink()  # as a folder from elsewhere
    scheduler = folder / "scheduler" / "scheduler_config.json"
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    scheduler.write_text(json.dumps(flow))
    with open_checkpoint(folder) as found:
        write_file(found, tmp_path / "b.safetensors")
    with Checkpoint(tmp_path / "b.safetensors") as file:
        assert file.metadata["recast.objective"] == "flow"
        assert "recast.scheduler" not in file.metadata


def test_a_scheduler_edited_afterwards_contradicts_the_file(tmp_path: Path) -> None:
    folder = written(tiny.checkpoint(tmp_path / "a.safetensors", "sdxl"), tmp_path / "folder")
    with Checkpoint(tmp_path / "a.safetensors") as file:
        write_file(file, tmp_path / "b.safetensors", objective="flow")
    folder = written(tmp_path / "b.safetensors", tmp_path / "flow")
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {
        "prediction_type": "epsilon", "use_flow_sigmas": False, "beta_start": 0.00085,
    }))  # fmt: skip
    with pytest.raises(Refused, match=r"json says eps, recast\.objective says flow"):
        open_model(folder)
    assert open_model(folder, parts=("unet",), objective="flow").objective.name == "flow"


def test_an_adapter_of_the_file_is_one_of_its_folder(tmp_path: Path) -> None:
    source = tiny.checkpoint(tmp_path / "a.safetensors", "sd15")
    folder = written(source, tmp_path / "folder")
    with open_checkpoint(folder) as found:
        split(found, detect(found).sites("te1"), 2, tmp_path / "split")
    adapter = read_adapter(tmp_path / "split" / "adapter.safetensors")
    with Checkpoint(source) as file:
        refuse_other_base(file, adapter)
    part = folder / "vae" / "diffusion_pytorch_model.safetensors"
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    with open_checkpoint(folder) as found, pytest.raises(Refused, match="belongs to"):
        refuse_other_base(found, adapter)


def test_what_is_no_whole_model_is_refused(tmp_path: Path) -> None:
    from dataclasses import replace

    from recast.layout.generate import generate

    generate(tmp_path / "a.safetensors", replace(tiny.ONE, vae=None))
    with pytest.raises(Refused, match="needs a VAE"):
        written(tmp_path / "a.safetensors", tmp_path / "folder")
    generate(tmp_path / "b.safetensors", tiny.ONE, metadata={"recast.role": "residual"})
    with pytest.raises(Refused, match="is a residual"):
        written(tmp_path / "b.safetensors", tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_a_folder_appears_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny.checkpoint(tmp_path / "a.safetensors", "sd15")

    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(committing, "_seal", full)
        with pytest.raises(Exception, match="make room"):
            written(source, tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    folder = written(source, tmp_path / "folder")
    with pytest.raises(Refused, match="exists"):
        written(source, folder)
    with pytest.raises(Refused, match="exists"):
        through_file(lambda path: pytest.fail("worked before it looked"), folder)


def test_beside_a_run_s_file(tmp_path: Path) -> None:
    first = tiny.checkpoint(tmp_path / "a.safetensors", "sd15")
    write_beside(first, tmp_path / "model")
    before = (tmp_path / "model" / "manifest.json").stat().st_mtime_ns
    write_beside(first, tmp_path / "model")
    assert (tmp_path / "model" / "manifest.json").stat().st_mtime_ns == before
    other = tiny.checkpoint(tmp_path / "b.safetensors", "sd15", seed=1)
    with pytest.raises(Refused, match="exists"):
        write_beside(other, tmp_path / "model")
    write_beside(other, tmp_path / "model", force=True)
    with open_checkpoint(tmp_path / "model") as found, Checkpoint(other) as file:
        assert found.sha256() == file.sha256()


def ours_and_theirs(
    source: Path, folder: Path, *, steps: int, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`recast sample` on the single file, and diffusers on the folder, nothing told."""
    import diffusers

    model = open_model(source)
    noise = torch.randn((1, *model.latent_shape(size)), generator=torch.Generator().manual_seed(5))
    ours = next(sample_images(model, [PROMPT], seeds=[5], steps=steps, scale=3.0, size=size)).image
    pipe = getattr(diffusers, PIPELINES[model.layout.family]).from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(torch.float32)
    theirs = pipe(
        PROMPT, latents=noise, num_inference_steps=steps, guidance_scale=3.0, height=size,
        width=size, output_type="pt",
    ).images[0]  # fmt: skip
    return (ours + 1) / 2, theirs


CASES = [("sdxl", "v-zsnr", 4), ("sd15", "flow", 25)]
SLOW = [("sdxl", "eps", 4), ("sd15", "v", 4), ("sdxl", "x0", 4), ("sdxl", "flow", 25)]


@pytest.mark.parametrize(
    ("family", "objective", "steps"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
)
def test_diffusers_paints_the_folder_s_picture(
    family: str, objective: str, steps: int, tmp_path: Path
) -> None:
    """4 steps are few and even: a wrong spacing, objective or text would show at once.

    Flow takes 25: diffusers tells the network whole thousandths of t, which few steps magnify, and
    so do networks that have learnt nothing.
    """
    source = tiny.checkpoint(tmp_path / "a.safetensors", family, vocabulary=49408)
    with Checkpoint(source) as file:
        write_file(file, tmp_path / "m.safetensors", objective=objective)
    folder = written(tmp_path / "m.safetensors", tmp_path / "folder")
    ours, theirs = ours_and_theirs(tmp_path / "m.safetensors", folder, steps=steps, size=64)
    assert theirs.std() > 0.01
    assert (ours - theirs).abs().max() < (3 if steps > 4 else 0.1) / 255
    assert (ours - theirs).abs().mean() < 0.5 / 255


@pytest.mark.slow
@pytest.mark.parametrize("name", pocket.NAMES)
def test_diffusers_paints_the_pocket_world_from_a_folder(name: str, tmp_path: Path) -> None:
    folder = written(pocket.path(name), tmp_path / "folder")
    ours, theirs = ours_and_theirs(pocket.path(name), folder, steps=28, size=64)
    assert (ours - theirs).abs().max() < 2 / 255
