"""The three published commands, as they are but for their paths, run on pocket-xl."""

import json
from pathlib import Path

import pytest
from published import FAST, FLOW, FULL_FINETUNE
from tests.convert import small

from recast import pocket
from recast.adapter import write_adapter
from recast.adapter.decompose import decompose
from recast.cli import main
from recast.layout import detect, open_checkpoint

PATHS = {  # of the commands, and what stands there here
    r"C:\models\diff.safetensors": "pocket-xl",
    "/models/pony.safetensors": "pocket-xl",
    r"C:\models\eq_vae.safetensors": str(pocket.VAE),
}


def here(command: str, folder: Path) -> str:
    """The command with paths of this machine."""
    there = PATHS | {
        r"C:\models\locon.safetensors": str(folder / "locon.safetensors"),
        r"C:\training\data": str(folder / "images"),
        r"C:\training": str(folder),
        "/training_dir/sample-prompts.txt": str(folder / "prompts.txt"),
        "/training_dir": str(folder / "images"),
        "/output_dir": str(folder / "out"),
    }
    for path, ours in there.items():
        command = command.replace(path, ours)
    return command


@pytest.fixture
def home(tmp_path: Path) -> Path:
    small.images(tmp_path / "images", 4)
    (tmp_path / "prompts.txt").write_text(
        "a big red star on dots at left --n plain --w 64 --h 64 --d 1 --l 2 --s 2\n"
    )
    return tmp_path


def run(command: str, home: Path, *more: str) -> list[dict]:
    """Run a command for two steps; returns the lines of its log."""
    (home / "train.txt").write_text(here(command, home), encoding="utf-8")
    words = ["kohya", "--file", str(home / "train.txt"), "--size", "64", "--steps", "2", *more]
    with pytest.raises(SystemExit) as end:
        main([*words, "--out", str(home / "run")])
    assert end.value.code == 0
    return [json.loads(line) for line in (home / "run" / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_fast_lora_runs(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run(FAST, home)
    assert [row["step"] for row in rows] == [1, 2]
    assert len(rows[0]["losses"]) == 48
    names = {path.name for path in (home / "run" / "saved").iterdir()}
    assert names == {"step00000001.safetensors", "step00000002.safetensors"}
    assert len(list((home / "run" / "previews").iterdir())) == 2
    assert (home / "run" / "lora.safetensors").stat().st_size > 0
    assert {name.partition(".")[0] for name in rows[-1]["change"]} >= {"TE1", "TE2", "OUT00"}
    assert "network.conv_dim = 256" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "profile"), [(FULL_FINETUNE, "principal,te1,te2"), (FLOW, "principal")]
)
def test_the_others_go_on_from_the_principal_adapter(
    command: str, profile: str, home: Path
) -> None:
    with open_checkpoint(pocket.path("pocket-xl")) as checkpoint:
        found = decompose(checkpoint, detect(checkpoint).sites(profile), 64)
    write_adapter(home / "locon.safetensors", found)
    rows = run(command, home)
    assert [row["step"] for row in rows] == [1, 2]
    assert (home / "run" / "initial.safetensors").exists()
    assert (home / "run" / "model.safetensors").exists()
