"""A .ckpt becomes a safetensors file without running what is in it; numbers change their dtype."""

import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests import tiny

from recast.checkpoint import Checkpoint
from recast.cli import main
from recast.layout import detect, open_checkpoint
from recast.layout.names import is_extra


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    about = {"modelspec.hash_sha256": "0x1", "mine": "stays"}
    folder = tmp_path_factory.mktemp("stores")
    return tiny.checkpoint(folder / "m.safetensors", "sd15", metadata=about)


def export(path: Path, out: Path, *words: str) -> None:
    with pytest.raises(SystemExit) as left:
        main(["export", str(path), "--to", "single-file", "--out", str(out), *words, "--json"])
    assert not left.value.code


def refused(capsys: pytest.CaptureFixture[str], path: Path, out: Path, *words: str) -> str:
    with pytest.raises(SystemExit) as left:
        main(["export", str(path), "--to", "single-file", "--out", str(out), *words])
    assert left.value.code == 2
    assert not out.exists()
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("old", [False, True])
def test_a_ckpt_keeps_every_tensor(model: Path, tmp_path: Path, old: bool) -> None:
    tensors = load_file(model)
    state: Any = {"state_dict": tensors, "global_step": 7, "epoch": 1}
    path = tmp_path / "m.ckpt"
    torch.save(state, path, _use_new_zipfile_serialization=not old)
    export(path, tmp_path / "o.safetensors")
    found = load_file(tmp_path / "o.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)
    with Checkpoint(tmp_path / "o.safetensors") as file:
        assert not detect(file).missing


class Harm:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(HARM),)


HARM = Path("harm")


def test_nothing_in_a_pickle_is_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"a": torch.ones(2)}, "x": Harm()}, tmp_path / "bad.ckpt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"a": Harm()}))
    (tmp_path / "empty.ckpt").write_bytes(b"")
    (tmp_path / "text.ckpt").write_text("hello")
    with zipfile.ZipFile(tmp_path / "zip.ckpt", "w") as archive:
        archive.writestr("a", "b")
    for name in ("bad.ckpt", "plain.pt", "empty.ckpt", "text.ckpt", "zip.ckpt"):
        said = refused(capsys, tmp_path / name, tmp_path / "o.safetensors")
        assert "nothing in it was run" in said, name
    assert not HARM.exists()
    torch.save([1, 2], tmp_path / "list.ckpt")
    assert "no state dict" in refused(capsys, tmp_path / "list.ckpt", tmp_path / "o.safetensors")


def test_numbers_change_their_dtype(model: Path, tmp_path: Path) -> None:
    export(model, tmp_path / "o.safetensors", "--dtype", "fp16")
    before, after = load_file(model), load_file(tmp_path / "o.safetensors")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        kept = is_extra(key) or not tensor.is_floating_point() or not tensor.numel()
        assert torch.equal(after[key], tensor if kept else tensor.half()), key
    with Checkpoint(tmp_path / "o.safetensors") as file:
        assert "modelspec.hash_sha256" not in file.metadata
        assert file.metadata["mine"] == "stays"


def test_a_folder_of_another_dtype_says_that_it_is_another(model: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as left:
        main(["export", str(model), "--to", "diffusers-folder", "--out", str(tmp_path / "f"),
              "--dtype", "bf16"])  # fmt: skip
    assert not left.value.code
    with open_checkpoint(tmp_path / "f") as folder, Checkpoint(model) as file:
        assert folder.sha256() != file.sha256()
        key = "model.diffusion_model.input_blocks.0.0.weight"
        assert torch.equal(folder[key], file[key].bfloat16())
    assert json.loads((tmp_path / "f" / "model_index.json").read_text())


def test_a_number_out_of_range_is_no_result(tmp_path: Path, model: Path) -> None:
    tensors = load_file(model)
    tensors["model.diffusion_model.out.0.bias"].fill_(1e6)
    torch.save(tensors, tmp_path / "m.ckpt")
    with pytest.raises(SystemExit) as left:
        main(["export", str(tmp_path / "m.ckpt"), "--to", "single-file", "--dtype", "fp16",
              "--out", str(tmp_path / "o.safetensors")])  # fmt: skip
    assert left.value.code == 1
    assert not (tmp_path / "o.safetensors").exists()
