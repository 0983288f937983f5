"""The command line's surface: help, examples, what goes to stdout, and what scripts can read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from tests.convert import command, small

from recast import cli

COMMANDS = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
PROMISED = {
    "convert", "dream", "split", "train", "rebuild", "sample", "inspect", "verify", "report",
}  # fmt: skip
RECIPE = """
[train]
steps = 2
batch = 2
[evaluate]
pictures = 3
steps = 2
bins = 2
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model.safetensors, images/ and a finished conversion in run/."""
    folder = tmp_path_factory.mktemp("cli")
    model = small.checkpoint(folder, "sd15", name="model")
    recipe = folder / "recipe.toml"
    recipe.write_text(RECIPE, encoding="utf-8")
    words = ["convert", model, "--images", small.images(folder / "images"), "--recipe", recipe]
    command.run([*words, "--to", "v-zsnr", "--out", folder / "run"])
    return folder


def printed(words: list[object], capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """What a command that succeeds prints on stdout and stderr."""
    capsys.readouterr()
    command.run(words)
    told = capsys.readouterr()
    return told.out, told.err


def test_every_promised_verb_is_there() -> None:
    assert set(COMMANDS) >= PROMISED


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_verb_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = printed([name, "--help"], capsys)
    assert f"recast {name}" in out
    assert "Example:" in out
    assert err == ""
    for parameter in COMMANDS[name].params:
        assert parameter.name == "help" or getattr(parameter, "help", None), parameter.name


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - {"demo"}))
def test_every_verb_has_json(name: str) -> None:
    verb = COMMANDS[name]
    for each in getattr(verb, "commands", {name: verb}).values():
        assert "--json" in [word for parameter in each.params for word in parameter.opts]


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    import recast

    assert printed(["--version"], capsys)[0] == f"recast {recast.__version__}\n"


def test_inspect(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = home / "run" / "model.safetensors"
    out, err = printed(["inspect", model, "--json"], capsys)
    facts = json.loads(out)
    assert (facts["family"], facts["objective"]["name"]) == ("sd15", "v-zsnr")
    assert err == ""
    out, err = printed(["inspect", model], capsys)
    assert "v-zsnr" in out
    assert err == ""


def test_sample(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sample", home / "model.safetensors", "--prompt", "a kite", "--prompt", "b [red]"]
    words += ["--steps", 2, "--seed", 3]
    out, err = printed([*words, "--out", tmp_path / "one", "--json"], capsys)
    names = ["00000-a-kite.png", "00001-b-red.png"]
    assert json.loads(out) == [str(tmp_path / "one" / name) for name in names]
    assert "sample: 2/2 pictures" in err
    out, _ = printed([*words, "--out", tmp_path / "two"], capsys)
    assert out.splitlines() == [str(tmp_path / "two" / name) for name in names]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize("options", [["--as", "flow"], ["--cfg", 1], ["--size", "64x72"]])
def test_sample_options_change_the_picture(
    options: list[object], home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sample", home / "model.safetensors", "--prompt", "a kite", "--steps", 2]
    command.run([*words, "--out", tmp_path / "plain"])
    command.run([*words, *options, "--out", tmp_path / "other"])
    plain, other = (next((tmp_path / name).glob("*.png")) for name in ("plain", "other"))
    assert plain.read_bytes() != other.read_bytes()


def test_split_verify_and_rebuild(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = home / "model.safetensors", tmp_path / "parts"
    adapter = out / "adapter.safetensors"
    text, _ = printed(["split", model, "--rank", 2, "--out", out, "--json"], capsys)
    assert json.loads(text)["adapter"] == str(adapter)
    residual = out / "residual.safetensors"
    words = ["verify", model, "--residual", residual, "--adapter", adapter, "--json"]
    assert json.loads(printed(words, capsys)[0])["verdict"] == "passed"
    whole = tmp_path / "whole.safetensors"
    words = ["rebuild", model, "--initial", adapter, "--trained", adapter, "--out", whole]
    assert json.loads(printed([*words, "--json"], capsys)[0])["file"] == str(whole)
    assert json.loads(printed(["verify", model, "--rebuilt", whole, "--json"], capsys)[0])


def test_a_check_that_fails_ends_with_code_1(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    converted = home / "run" / "model.safetensors"
    command.run(["verify", home / "model.safetensors", "--rebuilt", converted, "--json"], code=1)
    told = capsys.readouterr()
    assert json.loads(told.out)["verdict"] == "failed"
    assert told.err.startswith("recast: ")


def test_convert_prints_its_report(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["convert", home / "model.safetensors", "--images", home / "images", "--to", "v-zsnr"]
    words += ["--recipe", home / "recipe.toml", "--out", home / "run"]
    out, err = printed([*words, "--json"], capsys)
    assert json.loads(out) == json.loads((home / "run" / "report.json").read_text("utf-8"))
    assert "The report is written already." in err
    out, _ = printed(words, capsys)
    for word in ("model.safetensors", "ComfyUI", "diffusers", "report.html"):
        assert word in out


def test_the_command_in_the_report_repeats_the_run(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shlex

    report = json.loads((home / "run" / "report.json").read_text(encoding="utf-8"))
    program, *words = shlex.split(report["command"])
    assert program == "recast"
    assert "The report is written already." in printed(list(words), capsys)[1]


def test_report_shows_and_writes_the_page_again(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = home / "run"
    before = {path: path.read_bytes() for path in run.rglob("*.[phj][nts]*") if path.is_file()}
    assert run / "report.html" in before
    assert run / "pictures" / "00-original.png" in before
    (run / "report.html").unlink()
    (run / "pictures.png").unlink()
    out, err = printed(["report", run, "--json"], capsys)
    assert json.loads(out)["target"] == "v-zsnr"
    assert err == ""
    assert {path: path.read_bytes() for path in before} == before


def test_the_same_run_elsewhere_has_the_same_figures_and_pictures(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["convert", home / "model.safetensors", "--images", home / "images", "--to", "v-zsnr"]
    out, _ = printed(
        [*words, "--recipe", home / "recipe.toml", "--out", tmp_path, "--json"], capsys
    )
    again = json.loads(out)
    report = json.loads((home / "run" / "report.json").read_text(encoding="utf-8"))
    assert again.pop("command") != report.pop("command")
    assert again == report
    pictures = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.png"))
    assert len(pictures) == 1 + 3 * 3 + 4 * 2  # the sheet, three of each prompt, two without
    for name in pictures:
        assert (tmp_path / name).read_bytes() == (home / "run" / name).read_bytes(), name
