"""A conversion from end to end: what is written, what it says of itself, what it leaves alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.convert import command, small

from recast import convert
from recast.adapter import read_adapter, rebuild
from recast.checkpoint import Checkpoint
from recast.convert import Job
from recast.convert.training import loss_of
from recast.errors import Diverged
from recast.layout import detect
from recast.train import Seen, latest

RUNS = {
    "xl-flow": ("sdxl", "flow", True),
    "xl-zsnr": ("sdxl", "v-zsnr", False),
    "15-flow": ("sd15", "flow", False),
    "15-zsnr": ("sd15", "v-zsnr", True),
}
MARKS = {"flow": [], "v-zsnr": ["v_pred", "ztsnr"]}


def described(path: Path, capsys: pytest.CaptureFixture[str]) -> dict:
    """What `recast inspect --json` prints."""
    command.run(["inspect", path, "--json"])
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module", params=RUNS)
def finished(request: pytest.FixtureRequest, home: Path) -> tuple[Path, Path, str]:
    """(original, run folder, objective) of a whole conversion, with images or dreams."""
    family, objective, with_images = RUNS[request.param]
    original, out = home / f"{family}.safetensors", home / request.param
    images = home / "images" if with_images else None
    small.convert(Job(original, out, small.recipe(home, objective), images=images))
    return original, out, objective


def test_every_promised_file_is_there_and_belongs_to_the_run(
    finished: tuple[Path, Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    original, out, objective = finished
    for name in (*small.NAMES, "report.html", "report.json", "recipe.toml", "run.json"):
        assert (out / name).is_file(), name
    runs = set()
    for name in small.NAMES:
        with Checkpoint(out / name) as file:
            runs.add(file.metadata["recast.run"])
            assert file.metadata["recast.objective"] == objective
    assert len(runs) == 1

    facts = described(out / "model.safetensors", capsys)
    with Checkpoint(original) as file:
        assert facts["provenance"]["recast"]["base_sha256"] == file.sha256()
    assert facts["objective"]["name"] == objective
    assert facts["objective"]["contradictions"] == []
    assert facts["markers"] == MARKS[objective]
    assert facts["problems"] == []


def test_the_report_has_the_keys_that_scripts_rely_on(finished: tuple[Path, Path, str]) -> None:
    _, out, objective = finished
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    for key in ("alignment", "retention", "leakage", "psnr_same_noise_db", "drift"):
        assert {"original", "converted", "ratio"} <= report[key].keys(), key
    assert (report["source"], report["target"]) == ("eps", objective)
    assert report["psnr_same_noise_db"]["converted"] > 0
    assert report["drift"]["converted"] > 0
    assert report["alignment"]["converted"] is None
    assert "no judge" in report["alignment"]["note"]
    assert report["identity"] is not None
    assert [shot["original"] for shot in report["shots"]] == [
        f"pictures/{k:02d}-original.png" for k in range(3)
    ]
    assert report["hashes"].keys() == {*small.NAMES, "start.safetensors"}
    for shot in report["shots"]:
        assert all((out / shot[kind]).is_file() for kind in ("original", "converted", "wrong"))


def test_only_the_read_out_and_the_clock_have_changed(finished: tuple[Path, Path, str]) -> None:
    original, out, _ = finished
    with Checkpoint(original) as before, Checkpoint(out / "model.safetensors") as after:
        trained = {site.key for site in detect(before).sites("readout,time")}
        assert [key for key in after if key not in ("v_pred", "ztsnr")] == list(before)
        changed = {key for key in before if before.raw(key) != after.raw(key)}
        assert changed
        assert changed <= trained


def test_adapter_and_patch_rebuild_the_model(finished: tuple[Path, Path, str]) -> None:
    original, out, _ = finished
    adapter = read_adapter(out / "adapter.safetensors")
    patch = read_adapter(out / "patch.safetensors")
    with Checkpoint(original) as before, Checkpoint(out / "model.safetensors") as after:
        for key, tensor in rebuild(before, None, adapter):
            if key not in ("v_pred", "ztsnr"):
                assert torch.equal(tensor, after[key]), key
    for name, entry in adapter.entries.items():
        torch.testing.assert_close(patch.entries[name].dense(), entry.dense().half().float())


@pytest.mark.parametrize("family", ["sdxl", "sd15"])
def test_an_untrained_adapter_rebuilds_every_byte(
    family: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = home / f"{family}.safetensors"
    parts = tmp_path / "parts"
    command.run(["split", original, "--rank", 4, "--adapter-dtype", "fp32", "--out", parts])
    start = parts / "adapter.safetensors"
    out = tmp_path / "again.safetensors"
    command.run(["rebuild", original, "--initial", start, "--trained", start, "--out", out])
    capsys.readouterr()
    with Checkpoint(original) as before, Checkpoint(out) as after:
        assert list(before.specs.items()) == list(after.specs.items())
        assert all(before.raw(key) == after.raw(key) for key in before)


def test_the_published_recipe_runs_and_keeps_its_start(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    recipe = small.recipe(home, "flow", "flow-dadaptlion", rank=4)
    small.convert(
        Job(home / "sdxl.safetensors", out, recipe, images=home / "images", measure=False)
    )
    initial = read_adapter(out / "initial.safetensors")
    trained = read_adapter(out / "adapter.safetensors")
    assert (initial.role, trained.role) == ("pissa-init", "pissa-trained")
    assert initial.metadata["recast.run"] == trained.metadata["recast.run"]
    with (
        Checkpoint(home / "sdxl.safetensors") as before,
        Checkpoint(out / "model.safetensors") as after,
    ):
        for key, tensor in rebuild(before, initial, trained):
            assert torch.equal(tensor, after[key]), key
        assert any(before.raw(key) != after.raw(key) for key in before)


def test_the_train_verb_keeps_the_objective(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    words = ["train", home / "sd15.safetensors", home / "images", "--out", out]
    command.run([*words, "--rank", 2, "--steps", 2, "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert printed.keys() == {"initial", "adapter", "patch", "model"}
    assert described(out / "model.safetensors", capsys)["objective"]["name"] == "eps"
    with Checkpoint(out / "patch.safetensors") as file:
        assert any(key.endswith("lora_up.weight") for key in file)


def test_a_run_that_diverges_ends_with_code_4_and_names_the_step(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "wild.toml"
    recipe.write_text(
        "[train]\nlr = 1e30\nsteps = 8\nbatch = 2\nclip = 0.0\ncheckpoint_every = 1\n",
        encoding="utf-8",
    )
    out = tmp_path / "run"
    words = ["convert", home / "sdxl.safetensors", "--out", out, "--images", home / "images"]
    command.run([*words, "--recipe", recipe], code=4)
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("recast: step ")
    assert "lower the learning rate" in told
    assert not (out / "model.safetensors").exists()
    assert latest(out / "state") is not None


def test_not_a_number_keeps_the_last_good_state(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 3 to 5 are not finite; once they are, the run goes on from step 2 as if never ill."""
    calls = 0

    def ill(*given: object, **options: object) -> object:
        measure = loss_of(*given, **options)

        def answer(net: object, draw: object) -> Seen:
            nonlocal calls
            calls += 1
            seen = measure(net, draw)
            return Seen(seen.distance, seen.weighted * torch.nan) if calls > 2 else seen

        return answer

    def job(name: str) -> Job:
        recipe = small.recipe(home, "flow", steps=6)
        return Job(
            home / "sdxl.safetensors", tmp_path / name, recipe, images=home / "images",
            measure=False,
        )  # fmt: skip

    monkeypatch.setattr(convert.training, "loss_of", ill)
    with pytest.raises(Diverged, match="step 5"):
        small.convert(job("ill"))
    found = latest(tmp_path / "ill" / "state")
    assert found is not None
    assert found.step == 2
    monkeypatch.undo()
    small.convert(job("ill"))
    small.convert(job("well"))
    assert small.contents(tmp_path / "ill") == small.contents(tmp_path / "well")
