"""Every objective into every other, chains, warm starts, and the one thing that is impossible."""

from __future__ import annotations

import json
import math
from itertools import permutations
from pathlib import Path

import pytest
import torch
from tests.convert import small
from tests.convert.test_convert_refusals import refused
from tests.convert.test_convert_resume import Stop

from recast.adapter import read_adapter, rebuild
from recast.checkpoint import Checkpoint
from recast.convert import Job, run
from recast.convert.start import clock
from recast.errors import Refused, Stopped
from recast.events import Note
from recast.markers import read_objective
from recast.model import open_model
from recast.objective import FLOW, OBJECTIVES

PAIRS = list(permutations(OBJECTIVES, 2))
FEW = {("eps", "v"), ("v", "v-zsnr"), ("v-zsnr", "eps"), ("flow", "eps"), ("x0", "flow")}


def ends_well(out: Path, objective: str) -> None:
    """Every step was taken with a finite loss, and the file says what it predicts."""
    steps = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [step["skipped"] for step in steps] == [0] * len(steps)
    assert all(math.isfinite(loss) for step in steps for loss in step["losses"])
    with Checkpoint(out / "model.safetensors") as file:
        evidence = read_objective(file.specs, file.metadata)
        assert (evidence.objective, evidence.contradictions) == (objective, ())
        assert all(torch.isfinite(file[key]).all() for key in file)


@pytest.mark.parametrize(
    ("source", "objective"),
    [pytest.param(*pair, marks=[] if pair in FEW else [pytest.mark.slow]) for pair in PAIRS],
)
def test_every_objective_becomes_every_other(
    source: str, objective: str, home: Path, tmp_path: Path
) -> None:
    how = small.recipe(home, objective, steps=2, batch=4, checkpoint_every=2)
    job = Job(home / "sdxl.safetensors", tmp_path, how, source=source, measure=False)
    small.convert(job)
    ends_well(tmp_path, objective)


@pytest.mark.slow
@pytest.mark.parametrize(("source", "objective"), PAIRS)
def test_every_direction_is_measured(
    source: str, objective: str, home: Path, tmp_path: Path
) -> None:
    how = small.recipe(home, objective, steps=2, batch=4, checkpoint_every=2)
    images = home / "images"
    small.convert(Job(home / "sd15.safetensors", tmp_path, how, images=images, source=source))
    ends_well(tmp_path, objective)
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["drift"]["against_original"] > 0
    assert report["psnr_same_noise_db"]["original"] > 0


def test_eps_with_zero_terminal_snr_is_refused_with_the_reason(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["convert", home / "sdxl.safetensors", "--to", "eps-zsnr", "--out", tmp_path / "run"]
    said = refused(words, tmp_path, capsys)
    assert "pure noise" in said
    assert "v-zsnr or flow" in said


WAY = ("v-zsnr",)


def chain(home: Path, out: Path, **options: object) -> Job:
    how = small.recipe(home, "flow", steps=2, checkpoint_every=1)
    return Job(
        home / "sdxl.safetensors", out, how, images=home / "images", via=WAY, **options
    )  # fmt: skip


@pytest.fixture(scope="module")
def gone(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished chain eps -> v-zsnr -> flow."""
    out = tmp_path_factory.mktemp("chain")
    small.convert(chain(home, out, measure=False))
    return out


def test_a_chain_ends_at_the_last_leg_s_weights(home: Path, gone: Path) -> None:
    legs = [gone / "1-v-zsnr", gone / "2-flow"]
    first, second = (read_adapter(leg / "adapter.safetensors") for leg in legs)
    whole = read_adapter(gone / "adapter.safetensors")
    for name, entry in whole.entries.items():
        wanted = first.entries[name].dense() + second.entries[name].dense()
        torch.testing.assert_close(entry.dense(), wanted, atol=0, rtol=0)
        assert first.entries[name].dense().any()
    with Checkpoint(home / "sdxl.safetensors") as before, Checkpoint(legs[1] / MODEL) as last:
        patch = read_adapter(gone / "patch.safetensors")
        assert patch.metadata["recast.base_sha256"] == before.sha256()
        assert patch.metadata["recast.source"] == "eps"
        with Checkpoint(gone / MODEL) as after:
            for key, tensor in rebuild(before, None, whole):
                assert torch.equal(tensor, after[key])
                torch.testing.assert_close(tensor, last[key], atol=2e-3, rtol=2e-3)


@pytest.mark.slow
def test_a_chain_s_report_is_against_the_original(home: Path, tmp_path: Path) -> None:
    gone = tmp_path
    small.convert(chain(home, gone))
    report = json.loads((gone / "report.json").read_text(encoding="utf-8"))
    assert (report["model"], report["source"], report["target"]) == (
        "sdxl.safetensors",
        "eps",
        "flow",
    )
    assert "--via v-zsnr" in report["command"]
    assert any("v-zsnr" in note for note in report["notes"])
    assert report["losses"] is not None
    assert (gone / "1-v-zsnr" / "report.html").exists()
    assert not (gone / "2-flow" / "report.html").exists()


@pytest.mark.slow
def test_a_chain_goes_on_in_the_leg_where_it_was_stopped(
    home: Path, gone: Path, tmp_path: Path
) -> None:
    job = chain(home, tmp_path, measure=False)
    for leg in ("1-v-zsnr", "1-v-zsnr", "2-flow", "2-flow"):
        with pytest.raises(Stopped):
            Stop("train").follow(job)
        assert (tmp_path / leg / "state").exists()
        assert not (tmp_path / MODEL).exists()
    small.convert(job)
    assert (tmp_path / MODEL).read_bytes()[-5000:] == (gone / MODEL).read_bytes()[-5000:]


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--via", "flow"], "twice"),
        (["--via", "eps"], "twice"),
        (["--via", "flw"], "no objective 'flw'"),
        (["--via", "v", "--from", "patch.safetensors"], "--via or --from"),
    ],
)
def test_a_way_that_leads_nowhere_is_refused(
    words: list[str], wanted: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["convert", home / "sdxl.safetensors", *words, "--out", tmp_path / "run"]
    assert wanted in refused(line, tmp_path, capsys)


MODEL = "model.safetensors"


def test_a_warm_start_is_kept_where_it_is_not_trained(home: Path, tmp_path: Path) -> None:
    how = small.recipe(home, "flow", steps=2, checkpoint_every=1, warm="clock")
    job = Job(
        home / "sdxl.safetensors", tmp_path, how, images=home / "images", measure=False
    )  # fmt: skip
    with pytest.raises(Stopped):
        Stop("train").follow(job)
    notes = [event.text for event in run(job) if isinstance(event, Note)]
    assert any(note.startswith("Warm start of the clock: relative error") for note in notes)
    start, trained = (
        read_adapter(tmp_path / f"{name}.safetensors") for name in ("start", "adapter")
    )
    clock = {name for name in start.entries if "time_embed" in name}
    assert len(clock) == 4
    for name, entry in trained.entries.items():
        same = torch.equal(entry.dense(), start.entries[name].dense())
        assert same == (name in clock), name
        assert entry.dense().any()
    errors = json.loads(trained.metadata["recast.warm"])
    assert errors["clock"]["after"] < errors["clock"]["before"]
    patch = read_adapter(tmp_path / "patch.safetensors")
    assert clock <= patch.entries.keys()
    small.convert(job)


def test_the_clock_is_fitted_to_the_file_s_numbers_whatever_the_precision(home: Path) -> None:
    path = home / "sdxl.safetensors"
    with Checkpoint(path) as file:
        found = [
            clock(file, open_model(path, parts=("unet",), dtype=dtype), FLOW)[0]
            for dtype in (torch.float32, torch.bfloat16)
        ]
    assert found[0].keys() == found[1].keys()
    for name, entry in found[0].items():
        assert torch.equal(entry.dense(), found[1][name].dense()), name


def test_a_warm_start_needs_whole_layers(home: Path, tmp_path: Path) -> None:
    how = small.recipe(home, "flow", rank=2, profile="principal", warm="clock")
    with pytest.raises(Refused, match=r"train\.rank to 0"):
        small.convert(Job(home / "sdxl.safetensors", tmp_path, how, images=home / "images"))
