"""SIGKILL at random moments: nothing unreadable in between, the same bytes in the end."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.convert import child, small

from recast.checkpoint import Checkpoint

RECIPE = """
[train]
steps = 6
batch = 2
checkpoint_every = 2
[data]
pictures = 2
replay_steps = 3
[evaluate]
pictures = 2
steps = 2
bins = 2
"""


def words(home: Path, out: Path, images: bool) -> list[object]:
    """The command that is killed and given again."""
    recipe = home / "kill.toml"
    recipe.write_text(RECIPE, encoding="utf-8")
    given = ["convert", home / "sdxl.safetensors", "--out", out, "--recipe", recipe]
    return [*given, "--images", home / "images"] if images else given


def whole(folder: Path) -> int:
    """Read every tensor of every safetensors file; how many files there are."""
    found = [path for path in folder.rglob("*.safetensors") if path.is_file()]
    for path in found:
        with Checkpoint(path) as file:
            for key in file:
                file.raw(key)
    return len(found)


@pytest.mark.parametrize(
    "images",
    [pytest.param(True, marks=pytest.mark.slow, id="images"), pytest.param(False, id="dreams")],
)
def test_killed_and_given_again_the_command_ends_with_the_same_bytes(
    images: bool, home: Path, tmp_path: Path
) -> None:
    began = time.monotonic()
    process = child.start(words(home, tmp_path / "whole", images), tmp_path / "log")
    process.join(300)
    took = time.monotonic() - began
    assert process.exitcode == 0, (tmp_path / "log").read_text()

    out, moments = tmp_path / "killed", random.Random(f"{images}")
    for _ in range(3):
        process = child.start(words(home, out, images), tmp_path / "log")
        process.join(moments.uniform(0, 0.6 * took))
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), (tmp_path / "log").read_text()
        whole(out)
    process = child.start(words(home, out, images), tmp_path / "log")
    process.join(300)
    assert process.exitcode == 0, (tmp_path / "log").read_text()
    assert small.contents(out) == small.contents(tmp_path / "whole")
    assert not list(out.rglob("*.recast-tmp"))
    assert whole(out) == whole(tmp_path / "whole")


@pytest.mark.parametrize(
    ("number", "code"),
    [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGTERM, 143)],
)
def test_a_signal_from_outside_is_obeyed_after_a_step(
    number: int, code: int, home: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    recipe = tmp_path / "long.toml"
    recipe.write_text("[train]\nsteps = 100000\nbatch = 1\n", encoding="utf-8")
    given = ["train", home / "sd15.safetensors", home / "images", "--out", out]
    process = child.start([*given, "--recipe", recipe], tmp_path / "log")
    deadline = time.monotonic() + 120
    while not (out / "log.jsonl").exists() or not (out / "log.jsonl").stat().st_size:
        assert process.is_alive(), (tmp_path / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(120)
    assert process.exitcode == code, (tmp_path / "log").read_text()
    steps = len((out / "log.jsonl").read_text().splitlines())
    assert [path.name for path in (out / "state").iterdir()] == [f"step{steps:08d}"]


@pytest.mark.slow
def test_twenty_kills_of_the_real_command(home: Path, tmp_path: Path) -> None:
    def begin(out: Path) -> subprocess.Popen[bytes]:
        line = [sys.executable, "-m", "recast", *map(str, words(home, out, True))]
        return subprocess.Popen(line, stderr=subprocess.PIPE)

    began = time.monotonic()
    process = begin(tmp_path / "whole")
    _, told = process.communicate(timeout=600)
    took = time.monotonic() - began
    assert process.returncode == 0, told

    out, moments, kills = tmp_path / "killed", random.Random(3), 0
    rounds = 0
    while kills < 20:
        process = begin(out)
        try:
            _, told = process.communicate(timeout=moments.uniform(0.3, 1.0) * took)
            assert process.returncode == 0, told
            assert small.contents(out) == small.contents(tmp_path / "whole")
            rounds += 1
            out = tmp_path / f"killed{rounds}"  # it was done before its time: begin another
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
            whole(out)
    process = begin(out)
    _, told = process.communicate(timeout=600)
    assert process.returncode == 0, told
    assert small.contents(out) == small.contents(tmp_path / "whole")
