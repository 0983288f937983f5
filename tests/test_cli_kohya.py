"""The verbs kohya and recipe, without training."""

import json
from pathlib import Path

import pytest

from recast.cli import main
from recast.recipe import load

COMMAND = (
    "accelerate", "launch", "sdxl_train_network.py", "--pretrained_model_name_or_path=pocket-xl",
    "--network_module=lycoris.kohya", "--network_dim=8", "--sdpa",
)  # fmt: skip


def run(*arguments: str, code: int = 0) -> None:
    """Run the command line, which ends with an exit code."""
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    assert end.value.code == code


def test_a_command_becomes_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.toml"
    run("kohya", "--save-recipe", str(path), "--steps", "7", "--", *COMMAND)
    said = capsys.readouterr().out
    assert "--network_dim 8" in said
    assert "network.dim = 8" in said
    assert "no effect: attention runs" in said
    found = load(path)
    assert (found.network.dim, found.train.steps, found.train.lr) == (8, 7, 2e-6)


def test_the_same_from_a_file_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.bat").write_text(" ^\n ".join(COMMAND))
    path = tmp_path / "mine.toml"
    run("kohya", "--file", str(tmp_path / "train.bat"), "--save-recipe", str(path), "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == "pocket-xl"
    assert {"flag": "network_dim", "value": 8, "became": {"network.dim": 8}, "why": ""} in found[
        "flags"
    ]
    assert path.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--", *COMMAND, "--nonsense=1"], "--nonsense is no flag that Recast knows"),
        (["--", *COMMAND], "give --model, --images, --out"),
        (["--size", "64"], "give the command behind --"),
        (["--file", "absent.bat"], "absent.bat cannot be read"),
    ],
)
def test_mistakes_end_in_one_sentence(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run("kohya", *arguments, code=2)
    assert said in capsys.readouterr().err


def test_recipes_are_listed_shown_and_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("recipe", "list")
    assert "flow-dadaptlion" in capsys.readouterr().out
    run("recipe", "show", "quick")
    (tmp_path / "shown.toml").write_text(capsys.readouterr().out)
    assert load(tmp_path / "shown.toml") == load("quick")
    run("recipe", "check", "quick")
    assert "  train.steps = 100" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["burn"], "there is no recast recipe burn"),
        (["show"], "needs the recipe's name or file"),
        (["check", "defualt"], "the nearest is 'default'"),
    ],
)
def test_recipe_refuses(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run("recipe", *arguments, code=2)
    assert said in capsys.readouterr().err
