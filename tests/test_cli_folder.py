"""The verbs on diffusers folders, as a user types them."""

import json
import shutil
from pathlib import Path

import pytest
from tests import tiny
from tests.convert import command
from tests.test_cli import printed

from recast.checkpoint import Checkpoint
from recast.layout import open_checkpoint


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file and its folder."""
    home = tmp_path_factory.mktemp("folders")
    file = tiny.checkpoint(home / "model.safetensors", "sd15", vocabulary=49408)
    command.run(["export", file, "--to", "diffusers-folder", "--out", home / "model"])
    return home


def test_there_and_back(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = printed(["inspect", home / "model", "--json"], capsys)
    facts = json.loads(out)
    assert (facts["format"], facts["objective"]["name"]) == ("diffusers folder", "eps")
    back = tmp_path / "back.safetensors"
    printed(["export", home / "model", "--to", "single-file", "--out", back], capsys)
    with Checkpoint(back) as one, Checkpoint(home / "model.safetensors") as other:
        assert {key: one.raw(key) for key in one} == {key: other.raw(key) for key in other}
        assert one.metadata == other.metadata


def test_split_rebuild_and_verify_from_a_folder(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, parts = home / "model", tmp_path / "split"
    printed(["split", folder, "--rank", "2", "--profile", "te1", "--out", parts], capsys)
    adapter, residual = parts / "adapter.safetensors", parts / "residual.safetensors"
    words = ["--residual", residual, "--adapter", adapter, "--json"]
    for model in (folder, home / "model.safetensors"):  # both are the adapter's base
        assert json.loads(printed(["verify", model, *words], capsys)[0])["verdict"] == "passed"
    words = ["rebuild", folder, "--initial", adapter, "--trained", adapter, "--objective", "flow"]
    printed([*words, "--out", tmp_path / "flow", "--folder"], capsys)
    printed([*words, "--out", tmp_path / "flow.safetensors"], capsys)
    with open_checkpoint(tmp_path / "flow") as made, Checkpoint(tmp_path / "flow.safetensors") as f:
        assert made.sha256() == f.sha256()
        assert {key: made.raw(key) for key in made} == {key: f.raw(key) for key in f}
        assert made.metadata["recast.scheduler"] == "flow"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["inspect", "FOLDER/unet"], "it is one component: give the folder above it"),
        (["split", "SPOILT", "--out", "x"], "lists vae in its model_index.json"),
        (["export", "FILE", "--to", "diffusers-folder", "--out", "FOLDER"], "exists"),
        (["export", "FILE", "--to", "single-file", "--out", "x", "--pad"], "leave out"),
        (["export", "FOLDER", "--to", "single-file", "--force", "--out",
          "FOLDER/unet/diffusion_pytorch_model.safetensors"], "is also the source"),
    ],
)  # fmt: skip
def test_refusals(
    home: Path,
    tmp_path: Path,
    words: list[str],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    if "SPOILT" in words:
        shutil.copytree(home / "model", tmp_path / "spoilt")
        shutil.rmtree(tmp_path / "spoilt" / "vae")
    before = sorted(home.rglob("*"))
    places = {"FOLDER": home / "model", "FILE": home / "model.safetensors", "SPOILT": "spoilt"}
    for name, place in places.items():
        words = [word.replace(name, str(place)) for word in words]
    command.run(words, code=2)
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error
    assert error.strip().count("\n") == 0
    assert not (tmp_path / "x").exists()
    assert sorted(home.rglob("*")) == before
