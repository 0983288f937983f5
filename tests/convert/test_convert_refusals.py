"""Bad input: one sentence, exit code 2, nothing written, never a traceback."""

from __future__ import annotations

import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny
from tests.convert import command, small

from recast import cli_common
from recast.checkpoint import write_dict
from recast.errors import Refused
from recast.layout.generate import generate
from recast.recipe import load, override

Usage = namedtuple("Usage", "total used free")


def web_page(path: Path, home: Path) -> None:
    path.write_text("<!DOCTYPE html><html><title>401</title></html>", encoding="utf-8")


def truncated(path: Path, home: Path) -> None:
    path.write_bytes((home / "sdxl.safetensors").read_bytes()[:-100])


def pickled(path: Path, home: Path) -> None:
    torch.save({"state_dict": {"w": torch.zeros(2)}}, path)


def lora(path: Path, home: Path) -> None:
    names = ("lora_up.weight", "lora_down.weight", "alpha")
    write_dict(path, {f"lora_unet_x.{name}": torch.zeros(1, 1) for name in names}, {})


def flux(path: Path, home: Path) -> None:
    write_dict(path, {"double_blocks.0.img_attn.qkv.weight": torch.zeros(2, 2)}, {})


def part(name: str) -> Any:
    def without(path: Path, home: Path) -> None:
        generate(path, replace(tiny.plan("sdxl"), **{name: None}))

    return without


def contradicting(path: Path, home: Path) -> None:
    marks = {"modelspec.prediction_type": "v"}
    generate(path, tiny.plan("sd15"), metadata={"recast.objective": "eps", **marks})


def residual(path: Path, home: Path) -> None:
    generate(path, tiny.plan("sd15"), metadata={"recast.role": "residual"})


def folder(path: Path, home: Path) -> None:
    path.mkdir()


def nothing(path: Path, home: Path) -> None:
    pass


FILES: dict[str, tuple[Any, list[str]]] = {
    "absent": (nothing, ["does not exist"]),
    "folder": (folder, ["no model_index.json", "no diffusers folder"]),
    "truncated": (truncated, ["truncated", "download or copy it again"]),
    "web-page": (web_page, ["web page"]),
    "pickle": (pickled, ["is a pickle", "weights_only=True"]),
    "lora": (lora, ["LoRA", "lora_unet_x"]),
    "flux": (flux, ["Flux", "double_blocks.0"]),
    "no-text-encoder": (part("te1"), ["no text encoder"]),
    "no-second-text-encoder": (part("te2"), ["no second text encoder"]),
    "no-vae": (part("vae"), ["no VAE"]),
    "contradiction": (contradicting, ["recast.objective", "--source"]),
    "residual": (residual, ["residual"]),
}


def refused(
    words: list[object], place: Path, capsys: pytest.CaptureFixture[str], code: int = 2
) -> str:
    """Give a command that must be refused in one sentence, leaving `place` as it is."""
    before = tree(place)
    capsys.readouterr()
    command.run(words, code=code)
    told = capsys.readouterr()
    assert told.out == ""
    assert "Traceback" not in told.err
    sentences = [line for line in told.err.splitlines() if line.startswith("recast: ")]
    assert len(sentences) == 1, told.err
    assert tree(place) == before
    return sentences[0]


def tree(place: Path) -> dict[str, bytes]:
    """Every file below a folder, with its bytes; folders with none."""
    return {
        str(path.relative_to(place)): path.read_bytes() if path.is_file() else b"a folder"
        for path in place.rglob("*")
    }


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("verb", ["convert", "train", "sample", "dream"])
def test_files_that_are_no_whole_checkpoint(
    verb: str, kind: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, wanted = FILES[kind]
    path = tmp_path / f"model.{'ckpt' if kind == 'pickle' else 'safetensors'}"
    make(path, home)
    if (verb, kind) == ("dream", "no-vae"):
        return  # latents are all it needs
    words = {
        "convert": ["convert", path],
        "train": ["train", path, home / "images"],
        "sample": ["sample", path, "--prompt", "a kite"],
        "dream": ["dream", path],
    }[verb]
    said = refused([*words, "--out", tmp_path / "out"], tmp_path, capsys)
    for word in (path.name, *wanted):
        assert word in said


def pictures(place: Path) -> Path:
    return small.images(place / "pictures")


def broken(place: Path) -> Path:
    """A picture whose header is sound and whose body ends early, beside two that are whole."""
    made = pictures(place)
    data = (made / "1.png").read_bytes()
    (made / "1.png").write_bytes(data[: len(data) // 2])
    return made


def no_picture(place: Path) -> Path:
    made = pictures(place)
    (made / "1.png").write_bytes(b"no picture at all")
    return made


def empty(place: Path) -> Path:
    (place / "pictures").mkdir()
    return place / "pictures"


def absent(place: Path) -> Path:
    return place / "pictures"


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (absent, ["pictures", "no such folder"]),
        (empty, ["pictures", "holds no images"]),
        (broken, ["1.png", "skip"]),
        (no_picture, ["1.png", "skip"]),
    ],
)
def test_images_that_cannot_be_trained_on(
    make: Any, wanted: list[str], home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["convert", home / "sdxl.safetensors", "--images", make(tmp_path)]
    said = refused([*words, "--out", tmp_path / "out"], tmp_path, capsys)
    for word in wanted:
        assert word in said


@pytest.mark.parametrize("make", [broken, no_picture])
def test_broken_images_are_named_and_left_out_where_told(
    make: Any, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[train]\nsteps = 1\nbatch = 1\n", encoding="utf-8")
    out = tmp_path / "out"
    words = ["train", home / "sd15.safetensors", make(tmp_path), "--out", out, "--skip-broken"]
    command.run([*words, "--recipe", recipe])
    assert "1.png" in capsys.readouterr().err
    assert (out / "model.safetensors").exists()


def test_nothing_but_broken_images(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = broken(tmp_path)
    for name in ("0", "2"):
        (made / f"{name}.png").unlink()
    words = ["convert", home / "sdxl.safetensors", "--images", made, "--skip-broken"]
    assert "no picture that can be read" in refused(
        [*words, "--out", tmp_path / "out"], tmp_path, capsys
    )


RECIPES: dict[str, tuple[str, list[str]]] = {
    "unknown-key": ("[train]\nstps = 3\n", ["train.stps", "nearest is 'train.steps'"]),
    "unknown-section": ("[trane]\nsteps = 3\n", ["trane", "'train'"]),
    "wrong-value": ("[train]\nsteps = 0\n", ["train.steps"]),
    "broken": ("[train\n", ["not valid TOML"]),
    "objective": ('[target]\nobjective = "flwo"\n', ["target.objective", "flow"]),
    "solver": ('[evaluate]\nsolver = "eulr"\n', ["eulr"]),
    "optimizer-argument": ("[train.optimizer_args]\nbeta = 0.5\n", ["beta"]),
    "profile": ('[train]\nprofile = "reedout"\n', ["reedout", "readout"]),
    "text-encoder": ('[train]\nprofile = "te1"\n', ["te1", "UNet"]),
    "norms-with-a-rank": ("[train]\nrank = 4\n", ["norms or biases"]),
    "size": ("[data]\nsize = 100\n", ["data.size", "multiple of 8"]),
    "dream size": ("[data]\ndream_size = 100\n", ["data.dream_size", "multiple of 8"]),
    "prompts": ('[data]\nprompts = "gone.txt"\n', ["gone.txt"]),
    "test-prompts": ('[evaluate]\nprompts = "gone.txt"\n', ["gone.txt"]),
}


@pytest.mark.parametrize("kind", RECIPES)
def test_recipes(kind: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, wanted = RECIPES[kind]
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8")
    words = ["convert", home / "sdxl.safetensors", "--recipe", path]
    if kind == "objective":
        words += ["--to", "same"]
    said = refused([*words, "--out", tmp_path / "out"], tmp_path, capsys)
    for word in wanted:
        assert word in said


OPTIONS: dict[str, tuple[str, list[str]]] = {
    "unknown-to": ("convert MODEL --to flwo --out OUT", ["flwo", "flow"]),
    "same-already": ("convert MODEL --to eps --out OUT", ["predicts eps already"]),
    "unknown-source": ("convert MODEL --source epsilon --out OUT", ["epsilon", "--source"]),
    "unknown-recipe": ("convert MODEL --recipe defualt --out OUT", ["defualt", "'default'"]),
    "absent-recipe": ("convert MODEL --recipe gone.toml --out OUT", ["gone.toml"]),
    "device": ("convert MODEL --device cuda:99 --out OUT", ["--device cuda:99"]),
    "no-device": ("convert MODEL --device abacus --out OUT", ["--device abacus"]),
    "no-memory-device": ("convert MODEL --device meta --out OUT", ["--device meta"]),
    "out-is-a-file": ("convert MODEL --out FILE", ["FILE", "is a file"]),
    "out-below-a-file": ("convert MODEL --out FILE/run", ["FILE", "is a file"]),
    "rank": ("train MODEL IMAGES --rank 4 --recipe default --out OUT", ["norms or biases"]),
    "sample-as": ("sample MODEL --prompt x --as flwo --out OUT", ["flwo", "flow"]),
    "sample-source": ("sample MODEL --prompt x --source vee --out OUT", ["vee", "eps"]),
    "sample-size": ("sample MODEL --prompt x --size 100 --out OUT", ["--size", "multiples of 8"]),
    "sample-no-size": ("sample MODEL --prompt x --size big --out OUT", ["--size", "big"]),
    "sampler": ("sample MODEL --prompt x --sampler eulr --out OUT", ["eulr", "euler"]),
    "shift": ("sample MODEL --prompt x --shift 0 --out OUT", ["shift"]),
    "no-prompt": ("sample MODEL --out OUT", ["--prompt"]),
    "prompts-absent": ("sample MODEL --prompts gone.txt --out OUT", ["gone.txt"]),
    "prompts-line": ("sample MODEL --prompts LINES --out OUT", ["line 2", "--q"]),
    "sample-out": ("sample MODEL --prompt x --out FILE", ["FILE", "is a file"]),
    "dream-to": ("dream MODEL --to flwo --out OUT", ["flwo", "flow"]),
    "dream-size": ("dream MODEL --size 100 --out OUT", ["multiples of 8"]),
    "dream-prompts": ("dream MODEL --prompts gone.txt --out OUT", ["gone.txt"]),
    "dream-out": ("dream MODEL --out FILE", ["FILE"]),
    "split-dtype": ("split MODEL --adapter-dtype fp12 --out OUT", ["--adapter-dtype", "fp12"]),
    "split-profile": ("split MODEL --profile fulll --out OUT", ["fulll"]),
    "split-out": ("split MODEL --rank 1 --out FILE", ["FILE", "cannot be written"]),
    "rebuild-out": ("rebuild MODEL --trained MODEL --out IMAGES", ["no adapter entry"]),
    "rebuild-trained": ("rebuild MODEL --trained gone.safetensors --out OUT", ["gone"]),
    "rebuild-not-a-pair": ("rebuild MODEL --trained MODEL --out OUT", ["model.safetensors"]),
    "verify-nothing": ("verify MODEL", ["--rebuilt"]),
    "report-nothing": ("report IMAGES", ["report.json"]),
    "inspect-absent": ("inspect gone.safetensors", ["gone.safetensors"]),
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_options(
    kind: str,
    home: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    line, wanted = OPTIONS[kind]
    monkeypatch.chdir(tmp_path)
    shutil.copy(home / "sdxl.safetensors", tmp_path / "model.safetensors")
    (tmp_path / "FILE").write_text("mine", encoding="utf-8")
    (tmp_path / "LINES").write_text("a kite\na boat --q 3\n", encoding="utf-8")
    names = {"MODEL": "model.safetensors", "IMAGES": home / "images", "OUT": tmp_path / "out"}
    said = refused([names.get(word, word) for word in line.split()], tmp_path, capsys)
    for word in wanted:
        assert word in said


@pytest.mark.parametrize(
    "line",
    [
        "convert MODEL --steps 0 --out OUT",
        "convert MODEL --stps 3 --out OUT",
        "convert MODEL",
        "convertt MODEL",
        "dream MODEL --pictures many --out OUT",
    ],
)
def test_usage_errors_end_with_code_2(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command.run(line.replace("OUT", str(tmp_path / "out")).split(), code=2)
    told = capsys.readouterr()
    assert told.out == ""
    assert "Traceback" not in told.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["model.safetensors", "report.json", "adapter.safetensors"])
def test_files_that_no_run_wrote_are_not_replaced(
    name: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text("mine", encoding="utf-8")
    words = ["convert", home / "sdxl.safetensors", "--out", tmp_path]
    said = refused(words, tmp_path, capsys)
    assert f"{name} exists" in said
    assert "--force" in said


@pytest.mark.parametrize("verb", ["rebuild", "split", "sample"])
def test_existing_targets_are_not_replaced(
    verb: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = home / "sd15.safetensors", tmp_path / "out"
    adapter = home / "parts" / "adapter.safetensors"
    if not adapter.exists():
        command.run(["split", model, "--rank", 1, "--out", adapter.parent])
    mine = {
        "rebuild": out,
        "split": out / "residual.safetensors",
        "sample": out / "00000-a-kite.png",
    }[verb]
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine", encoding="utf-8")
    words = {
        "rebuild": ["rebuild", model, "--initial", adapter, "--trained", adapter],
        "split": ["split", model, "--rank", 1],
        "sample": ["sample", model, "--prompt", "a kite", "--steps", 1],
    }[verb]
    assert "exists" in refused([*words, "--out", out], tmp_path, capsys)
    command.run([*words, "--out", out, "--force"])
    assert mine.read_bytes() != b"mine"


@pytest.mark.parametrize("verb", ["convert", "split", "rebuild", "dream"])
def test_a_full_disk_ends_with_code_5_and_writes_nothing(
    verb: str,
    home: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, out = home / "sd15.safetensors", tmp_path / "out"
    adapter = home / "parts" / "adapter.safetensors"
    if verb == "rebuild" and not adapter.exists():
        command.run(["split", model, "--rank", 1, "--out", adapter.parent])
    words = {
        "convert": ["convert", model, "--images", home / "images"],
        "split": ["split", model, "--rank", 1],
        "rebuild": ["rebuild", model, "--initial", adapter, "--trained", adapter],
        "dream": ["dream", model, "--pictures", 1],
    }[verb]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**6, 10**6 - 1000, 1000))
    said = refused([*words, "--out", out], tmp_path, capsys, code=5)
    assert "1,000 bytes free" in said


def test_a_folder_that_cannot_be_written_to(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    words = ["convert", home / "sdxl.safetensors", "--out", tmp_path / "out"]
    assert "cannot be written to" in refused(words, tmp_path, capsys)


@pytest.mark.parametrize("flags", [{"objective": "flwo"}, {"target": {"objective": "flwo"}}])
def test_override_refuses_an_unknown_objective(flags: dict[str, Any]) -> None:
    with pytest.raises(Refused, match="flwo"):
        override(load(), **flags)


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    from recast import cli

    for words in (["--debug", "inspect", "gone"], ["inspect", "gone", "--debug"]):
        with pytest.raises(Refused, match="gone"):
            cli.main(words)


@pytest.mark.parametrize(
    ("error", "code", "wanted"),
    [
        (KeyError("x"), 1, "unexpected KeyError"),
        (OSError(28, "No space left on device", "state/x"), 5, "state/x is full"),
        (MemoryError(), 5, "lower train.batch"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_what_nobody_foresaw_is_a_sentence_too(
    error: BaseException,
    code: int,
    wanted: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr(cli_common, "model_path", fail)
    monkeypatch.setattr("recast.cli_files.model_path", fail)
    command.run(["inspect", "x"], code=code)
    told = capsys.readouterr()
    assert wanted in told.err
    assert "Traceback" not in told.err
