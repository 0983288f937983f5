"""Markers and metadata of files, and what is written beside them."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import tiny

from recast.checkpoint import Checkpoint
from recast.cli import main
from recast.layout import SD15, SDXL
from recast.markers import read_objective
from recast.surgery.hints import webui


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    about = {"recast.objective": "v", "modelspec.hash_sha256": "0x12", "mine": "stays"}
    return tiny.checkpoint(tmp_path_factory.mktemp("mark") / "m.safetensors", metadata=about)


def recast(capsys: pytest.CaptureFixture[str], *words: object) -> Any:
    with pytest.raises(SystemExit) as left:
        main(["mark", *map(str, words), "--json"])
    assert not left.value.code, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def data(path: Path) -> str:
    found = path.read_bytes()
    return hashlib.sha256(found[8 + int.from_bytes(found[:8], "little") :]).hexdigest()


@pytest.mark.parametrize("objective", ["eps", "v", "v-zsnr", "flow", "x0"])
def test_a_marked_file_states_it_and_keeps_every_byte(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], objective: str
) -> None:
    out = tmp_path / "o.safetensors"
    facts = recast(capsys, model, "--as", objective, "--out", out)
    assert (facts["objective"], facts["contradictions"]) == (objective, [])
    assert data(out) == data(model)
    with Checkpoint(out) as file:
        seen = read_objective(file.specs, file.metadata)
        assert (seen.objective, seen.contradictions) == (objective, ())
        assert ("v_pred" in file, "ztsnr" in file) == (objective[0] == "v", objective == "v-zsnr")
        assert file.metadata["mine"] == "stays"
        assert file.metadata["modelspec.hash_sha256"] == "0x12"
        assert file.metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    again = tmp_path / "again.safetensors"
    recast(capsys, out, "--strip", "--out", again)
    with Checkpoint(again) as file:
        seen = read_objective(file.specs, file.metadata)
        assert seen.reasons == ("no marker: the default of Stable Diffusion",)
        assert "modelspec.prediction_type" not in file.metadata
    assert data(again) == data(model)


def test_a_look_changes_nothing(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(model.parent.iterdir())
    facts = recast(capsys, model)
    assert "v_pred tensor is absent" in facts["contradictions"][0]
    tools = {row["loader"]: row for row in facts["tools"]}
    assert tools["Forge, reForge"]["objective"] == "eps"
    assert "--v_parameterization" in tools["kohya's trainers"]["note"]
    assert "--hints" in tools["A1111"]["note"]
    assert sorted(model.parent.iterdir()) == before


def test_fields_are_set_and_removed(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    recast(capsys, model, "--set", "title=A = B", "--set", "resolution=8x8", "--out", one)
    with Checkpoint(one) as file:
        assert file.metadata["modelspec.title"] == "A = B"
        assert file.metadata["recast.objective"] == "v"
    recast(capsys, one, "--set", "title=", "--out", two)
    with Checkpoint(two) as file:
        assert "modelspec.title" not in file.metadata
        assert file.metadata["modelspec.resolution"] == "8x8"


def test_hints_tell_what_no_marker_can(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "f.safetensors"
    words = ["--hints", "--shift", 2.5, "--out", out]
    facts = recast(capsys, model, "--as", "flow", *words)
    assert facts["hints"] == [str(tmp_path / "f.load.txt")]
    text = (tmp_path / "f.load.txt").read_text(encoding="utf-8")
    assert "ModelSamplingSD3 (shift 2.5)" in text
    out = tmp_path / "v.safetensors"
    facts = recast(capsys, model, "--as", "v-zsnr", "--hints", "--out", out)
    config = json.loads((tmp_path / "v.yaml").read_text(encoding="utf-8"))
    assert config["model"]["params"]["denoiser_config"]["params"]["scaling_config"] == {
        "target": "sgm.modules.diffusionmodules.denoiser_scaling.VScaling"
    }
    assert "Zero Terminal SNR" in (tmp_path / "v.load.txt").read_text(encoding="utf-8")
    tools = {row["loader"]: row for row in recast(capsys, out)["tools"]}
    assert tools["A1111"]["objective"] == "as its .yaml says"


def test_the_configuration_is_that_of_the_full_size() -> None:
    unet = webui(SDXL)["model"]["params"]["network_config"]["params"]
    assert (unet["model_channels"], unet["channel_mult"]) == (320, [1, 2, 4])
    assert (unet["context_dim"], unet["adm_in_channels"]) == (2048, 2816)
    assert (unet["attention_resolutions"], unet["transformer_depth"]) == ([2, 4], [1, 2, 10])
    old = webui(SD15)["model"]["params"]
    assert old["parameterization"] == "v"
    assert old["unet_config"]["params"]["attention_resolutions"] == [1, 2, 4]
    assert old["unet_config"]["params"]["channel_mult"] == [1, 2, 4, 4]


def test_an_adapter_is_told_in_its_header_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "lora_unet_output_blocks_1_1_transformer_blocks_0_attn1_to_q"
    tensors = {f"{name}.lora_up.weight": torch.ones(4, 2), f"{name}.alpha": torch.tensor(2.0),
               f"{name}.lora_down.weight": torch.ones(2, 4)}  # fmt: skip
    save_file(tensors, tmp_path / "l.safetensors", {"sshs_model_hash": "1", "ss_a": "b"})
    out = tmp_path / "o.safetensors"
    facts = recast(capsys, tmp_path / "l.safetensors", "--as", "v", "--out", out)
    assert facts["tools"][-1]["loader"] == "every program"
    assert load_file(out).keys() == tensors.keys()
    with Checkpoint(out) as file:
        assert file.metadata["recast.objective"] == "v"
        assert file.metadata["modelspec.prediction_type"] == "v"
        assert file.metadata["sshs_model_hash"] == "1"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--as", "velocity"], "choose eps, v, v-zsnr"),
        (["--as", "v"], "--out"),
        (["--out", "o"], "--strip"),
        (["--as", "v", "--strip", "--out", "o"], "one of them"),
        (["--set", "titel=a", "--out", "o"], "title="),
        (["--set", "date=yesterday", "--out", "o"], "2026-11-21"),
        (["--set", "prediction_type=v", "--out", "o"], "--as"),
        (["--hints"], "--as"),
    ],
)
def test_mistakes_end_in_one_sentence(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    before = sorted(model.parent.iterdir())
    with pytest.raises(SystemExit) as left:
        main(["mark", str(model), *(str(tmp_path / w) if w == "o" else w for w in words)])
    assert left.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())
    assert sorted(model.parent.iterdir()) == before


def test_other_files_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(SystemExit) as left:
        main(["mark", str(tmp_path / "a.safetensors"), "--as", "v", "--out", str(tmp_path / "o")])
    assert left.value.code == 2
    assert "no checkpoint or adapter" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "o").exists()
