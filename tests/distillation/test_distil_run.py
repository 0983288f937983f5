"""A whole distillation: its files, their proof, its resumption, what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.distillation.tiny_distil import config, do, rows

from recast.checkpoint import Checkpoint
from recast.distill.assessor import Assessor, Shape
from recast.distill.store import write_assessor
from recast.distill.taps import FeatureTap
from recast.distillation import files
from recast.distillation.networks import Pair
from recast.errors import CheckFailed, Refused, Stopped
from recast.model import open_model

DREAMING = 2  # times that the dreams ask whether to stop


@pytest.fixture(scope="module")
def whole(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    said = do(config(home, out))
    assert any("changed" in line and line.startswith("Step 4") for line in said)
    return out


def after(count: int) -> Callable[[], int]:
    """A signal that comes when it has been asked for often enough."""
    asked = 0

    def stopped() -> int:
        nonlocal asked
        asked += 1
        return 15 if asked > count else 0

    return stopped


def test_files_are_proven_and_older_ones_pruned_after_that(whole: Path, home: Path) -> None:
    good = json.loads((whole / "good.json").read_text())
    with (
        Checkpoint(whole / "model.safetensors") as file,
        Checkpoint(home / "sd15.safetensors") as base,
    ):
        assert file.sha256() == good["sha256"]
        assert file.nbytes == good["size"]
        assert len(file) == good["tensors"]
        assert set(file) == {k for k in base if k != "v_pred"} | {"v_pred"}
        assert file.metadata["recast.components"] == "unet,te1,vae"
        kept = [k for k in base if k.startswith(("first_stage", "cond_stage"))]
        assert kept
        assert all(file.raw(k) == base.raw(k) for k in kept)
    assert good["changed"] > 0.9 * good["unet"]
    assert good["error"] <= 1e-5 < good["rounded"]
    assert [p.name for p in sorted((whole / "models").iterdir())] == ["step00000002.safetensors"]
    assert [p.name for p in sorted((whole / "state").iterdir())] == ["step00000002", "step00000004"]
    model = open_model(whole / "model.safetensors")
    assert model.objective.name == "v"


def test_the_log_tells_what_was_done(whole: Path) -> None:
    found = rows(whole)
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    one = found[0]
    assert one["loss"] == pytest.approx(one["flow"] + 0.05 * one["blocks"])
    assert one["R"] == pytest.approx(0.05 * one["blocks"] / one["flow"])
    assert list(one["lambda"]) == [f"down_{k}" for k in range(4)] + ["mid"] + [
        f"up_{k}" for k in range(4)
    ]
    assert one["lambda"]["mid"] == pytest.approx(1.2)
    assert len(one["bins"]) == 10
    assert [row["gradient_ratio"] is not None for row in found] == [True, False, True, False]
    assert found[0]["lr"] == 1e-3 > found[-1]["lr"]
    report = json.loads((whole / "report.json").read_text())
    assert report["steps"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 2])
def test_an_interrupted_run_goes_on_bit_for_bit(
    step: int, whole: Path, home: Path, tmp_path: Path
) -> None:
    how = config(home, tmp_path / "run")
    with pytest.raises(Stopped, match=f"after step {step}; the same command goes on") as caught:
        do(how, after(DREAMING + step - 1))
    assert caught.value.code == 143
    do(how)
    assert rows(tmp_path / "run") == rows(whole)
    one, other = (f / "model.safetensors" for f in (tmp_path / "run", whole))
    with Checkpoint(one) as a, Checkpoint(other) as b:
        assert all(a.raw(key) == b.raw(key) for key in a)


@pytest.mark.slow
def test_a_run_killed_between_state_and_file_makes_up_for_the_file(
    whole: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = config(home, tmp_path / "run")

    def killed(*given: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(files, "checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            do(how)
    assert not (tmp_path / "run" / "models").exists()
    said = do(how)
    assert any(line.startswith("Step 2: step00000002") for line in said)
    assert rows(tmp_path / "run") == rows(whole)


@pytest.mark.slow
def test_a_file_that_is_the_base_is_refused_and_the_one_before_stays(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = config(home, tmp_path / "run")
    with pytest.raises(Stopped):
        do(how, after(DREAMING + 2))
    before = (tmp_path / "run" / "models" / "step00000002.safetensors").read_bytes()
    real = files.checkpoint

    def of_base(pair: Pair, *rest: object) -> object:
        layout, base = pair.model.layout, pair.model.checkpoint
        return real(replace(pair, dense=lambda: files.unet_of(base, layout)), *rest)

    monkeypatch.setattr(files, "checkpoint", of_base)
    with pytest.raises(CheckFailed, match="equal the base's"):
        do(how)
    assert (tmp_path / "run" / "models" / "step00000002.safetensors").read_bytes() == before
    assert json.loads((tmp_path / "run" / "good.json").read_text())["step"] == 2


@pytest.mark.slow
def test_a_file_that_answers_otherwise_is_refused(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = files.checkpoint

    def bent(pair: Pair, *rest: object) -> object:
        state = {k: 1.001 * v for k, v in pair.dense().items()}
        return real(replace(pair, dense=lambda: state), *rest)

    monkeypatch.setattr(files, "checkpoint", bent)
    with pytest.raises(CheckFailed, match="off the student's"):
        do(config(home, tmp_path / "run", run={"steps": 2}))


@pytest.mark.slow
def test_an_adapter_learns_flow_and_is_written_merged_without_text_and_vae(
    home: Path, tmp_path: Path
) -> None:
    how = config(
        home, tmp_path / "run", run={"steps": 2}, save={"text": False, "vae": False},
        student={"kind": "adapter", "profile": "all", "dim": 4}, target={"kind": "mix"},
        blocks={"kd": "pooled", "weight": "auto", "local_weight": 0.5},
    )  # fmt: skip
    do(how)
    with Checkpoint(tmp_path / "run" / "model.safetensors") as file:
        assert file.metadata["recast.components"] == "unet"
        assert file.metadata["recast.objective"] == "flow"
        assert all(key.startswith("model.diffusion_model.") for key in file)
    good = json.loads((tmp_path / "run" / "good.json").read_text())
    assert 0 < good["changed"] < good["unet"]


def assessor(home: Path, path: Path, bins: int = 4, where: str = "pre_resample") -> Path:
    """One that nobody has trained, for the tiny teacher."""
    model = open_model(home / "sd15.safetensors", parts=("unet",))
    tap = FeatureTap(model.unet, where=where)
    print_ = tap.fingerprint(model.objective)
    widths = map(int, print_["channels"].split(","))
    shape = Shape(dict(zip(tap.blocks, widths, strict=True)), d=8, hidden=8, bins=bins, patterns=2)
    made = Assessor(shape, torch.Generator().manual_seed(0))
    write_assessor(path, made, print_, {})
    return path


@pytest.mark.slow
def test_an_assessor_weighs_blocks_and_times(home: Path, tmp_path: Path) -> None:
    made = str(assessor(home, tmp_path / "a.safetensors", bins=2))
    times = {"sampler": "assessor", "threshold": 0.0}
    out = tmp_path / "run"
    said = do(config(home, out, run={"steps": 2}, blocks={"assessor": made}, times=times))
    assert any("bins count" in line for line in said)
    with Checkpoint(out / "profile.safetensors") as file:
        assert file["n"].sum() >= 24
    found = rows(out)
    assert sum(found[-1]["lambda"].values()) == pytest.approx(8.6, rel=1e-4)
    literal = {"assessor": made, "signals": "literal", "normalise": "none", "high": 1.3}
    out = tmp_path / "literal"
    said = do(config(home, out, run={"steps": 2}, blocks=literal, times={"threshold": 0.0}))
    assert rows(out)[0]["saturated"] > 0.5
    assert any("the bounds decide" in line for line in said)


@pytest.mark.slow
def test_an_assessor_that_knows_nothing_or_another_network_is_refused(
    home: Path, tmp_path: Path
) -> None:
    blocks = {"assessor": str(assessor(home, tmp_path / "a.safetensors", bins=20))}
    with pytest.raises(Refused, match="unusable"):
        do(config(home, tmp_path / "one", blocks=blocks))
    other = {"assessor": str(assessor(home, tmp_path / "b.safetensors", where="post_block"))}
    with pytest.raises(Refused, match="another network"):
        do(config(home, tmp_path / "two", blocks=other))
    with pytest.raises(Refused, match="is no assessor"):
        do(config(home, tmp_path / "three", blocks={"assessor": str(home / "sd15.safetensors")}))
    with pytest.raises(Refused, match="does not exist"):
        do(config(home, tmp_path / "four", blocks={"assessor": "absent.safetensors"}))
    assert not (tmp_path / "four").exists()


def test_without_a_latent_source_there_is_no_run(home: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(Refused):
        do(config(home, tmp_path / "one", data={"images": str(tmp_path / "empty")}))
    with pytest.raises(Refused, match="does not exist"):
        do(config(home, tmp_path / "two", data={"images": str(tmp_path / "absent")}))
    assert not (tmp_path / "one").exists()


@pytest.mark.slow
def test_another_runs_folder_is_refused_unless_forced(
    whole: Path, home: Path, tmp_path: Path
) -> None:
    with pytest.raises(Refused, match="holds another run"):
        do(config(home, whole, optimizer={"lr": 2e-3}))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.safetensors").touch()
    with pytest.raises(Refused, match="no file of this run"):
        do(config(home, tmp_path / "run"))
    do(config(home, tmp_path / "run", run={"steps": 1}), force=True)
    assert (tmp_path / "run" / "model.safetensors").stat().st_size


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_users_pictures_in_half_precision(precision: str, home: Path, tmp_path: Path) -> None:
    from PIL import Image

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for k in range(2):
        Image.new("RGB", (48, 40), (40 + 90 * k, 90, 200)).save(pictures / f"{k}.png")
        (pictures / f"{k}.txt").write_text("an old lamp")
    out = tmp_path / "run"
    do(
        config(
            home, out, run={"steps": 2, "precision": precision}, target={"kind": "mix"},
            # at 32 pixels torch's bf16 convolutions of 2 x 2 places give no finite gradient
            data={"images": str(pictures), "size": 128},
        )
    )  # fmt: skip
    assert all(row["loss"] > 0 for row in rows(out))
    assert json.loads((out / "good.json").read_text())["error"] <= 1e-5
