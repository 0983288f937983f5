"""What a run holds on its device: one kind of network at once, in the run's precision."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest
import torch
from tests.convert import small
from tests.convert.test_convert_resume import Stop
from tests.model import turns

from recast.convert import Job, run
from recast.convert.fixed import FIXED, PREVIEWS
from recast.errors import Stopped
from recast.evaluate.report import load_report
from recast.events import Event, Note
from recast.recipe import Recipe, override

WATCH = {"validate_every": 2, "validate_on": 2, "previews_every": 2, "previews": 1}
ALONE = ("te1", "unet", "vae"), ("te1", "te2")


def recipe(home: Path, **train: object) -> Recipe:
    """Images and dreams, into another VAE (here the model's own), validated, with previews."""
    how = small.recipe(home, "flow", steps=2, checkpoint_every=2, **train)
    data = {"source": "mix", "vae": str(home / "sdxl.safetensors")}
    return override(how, data=data, watch=WATCH | {"preview_steps": 2})


def job(home: Path, out: Path, how: Recipe) -> Job:
    return Job(home / "sdxl.safetensors", out, how, images=home / "images")


@dataclass(frozen=True)
class Seen:
    """A run by networks that took turns, what it told, and what was on the device meanwhile."""

    out: Path
    told: list[Event]
    turns: turns.Turns


@pytest.fixture(scope="module")
def seen(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    out = tmp_path_factory.mktemp("turns")
    with pytest.MonkeyPatch.context() as patch:
        found = turns.watch(patch)
        told = list(run(job(home, out, recipe(home, precision="bf16"))))
    return Seen(out, told, found)


def test_no_stage_holds_two_kinds_of_network(seen: Seen) -> None:
    alone = {frozenset([name]) for name in ALONE[0]} | {frozenset(ALONE[1])}
    training = frozenset(["unet", "vae"])  # small pictures
    assert seen.turns.together == alone | {training}
    assert {name for name, where in seen.turns.moves if where == "cpu"} == {
        "UNet2DConditionModel", "AutoencoderKL", "CLIPTextModel", "CLIPTextModelWithProjection",
    }  # fmt: skip


def test_every_stage_runs_in_the_precision_of_the_run(seen: Seen) -> None:
    dtypes = {(name, dtype) for here in seen.turns.here for name, dtype in here.items()}
    half = {(name, torch.bfloat16) for name in ("unet", "te1", "te2")}
    assert dtypes == half | {("vae", torch.float32)}
    report = load_report(seen.out)
    assert report.settings["train"]["precision"] == "bf16"
    assert report.psnr_same_noise_db.converted is not None


@pytest.mark.slow
def test_where_networks_take_turns_the_files_are_the_same(
    seen: Seen, home: Path, tmp_path: Path
) -> None:
    small.convert(job(home, tmp_path, recipe(home, precision="bf16")))
    names = (*small.NAMES, FIXED, PREVIEWS, "previews/step00000002.png")
    assert small.contents(tmp_path, names) == small.contents(seen.out, names)
    ours, theirs = (load_report(out) for out in (tmp_path, seen.out))
    assert (ours.drift, ours.null, ours.psnr_same_noise_db) == (
        theirs.drift, theirs.null, theirs.psnr_same_noise_db,
    )  # fmt: skip


def test_the_way_into_another_vae_is_told_once(seen: Seen) -> None:
    notes = [event.text for event in seen.told if isinstance(event, Note)]
    assert len([text for text in notes if "latent spaces" in text]) == 1


@pytest.mark.slow
def test_every_stage_of_an_sdxl_run_in_bf16_is_forecast_below_8_gb(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    stages = import_module("stages")
    found = {call.name: call for call in stages.calls(stages.model_of(stages.SDXL, 1024, "bf16"))}
    turns_taken = {name: call.parts for name, call in found.items()}
    assert turns_taken == {
        "prompts": "te1 + te2", "encode": "vae", "paint": "unet", "decode": "vae",
    }  # fmt: skip
    assert {name for asked in stages.STAGES.values() for name in asked} == set(found)
    # 2,567,463,684 numbers of two bytes
    assert found["paint"].held == 5_134_927_368
    assert max(call.total for call in found.values()) < 8e9
    assert all(call.alive > 0 for call in found.values())


def test_a_run_can_be_stopped_between_two_captions(home: Path, tmp_path: Path) -> None:
    broken = job(home, tmp_path, recipe(home))
    with pytest.raises(Stopped, match="while encoding captions"):
        Stop("encode captions").follow(broken)
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 2  # "" and the first
