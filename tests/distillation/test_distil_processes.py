"""Several processes distil one student: two of them on the CPU, over gloo."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.distillation.test_distil_run import assessor
from tests.distillation.tiny_distil import config, rows
from tests.launched import ended, launch, said

from recast.checkpoint import Checkpoint
from recast.distillation import Job, checked
from recast.distillation.sharing import widened
from recast.errors import Refused
from recast.train import latest


def start(home: Path, out: Path, count: int, accumulate: int, logs: str, **more: Any) -> list:
    """Start a distillation by so many processes, from a file beside its folder.

    Everything that remembers what it saw is in use: fusion, block weight, profile, local heads.
    """
    made = home / "assessor.safetensors"
    if not made.exists():
        assessor(home, made, bins=2)
    config(
        home, out, run={"accumulate": accumulate, "steps": 4},
        blocks={
            "assessor": str(made), "local_weight": 0.5, "weight": "auto", "auto_warmup": 2,
            "gradients_every": 3,
        },
        times={"sampler": "assessor", "threshold": 0.0, "profile": 4}, save={"every": 2}, **more,
    )  # fmt: skip
    words = ["distill", "--config", out.with_suffix(".toml"), "--device", "cpu"]
    return launch(words, out.parent / logs, count)


@pytest.fixture(scope="module")
def alone(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run by one process that accumulates two draws."""
    out = tmp_path_factory.mktemp("alone") / "run"
    assert ended(start(home, out, 1, 2, "logs")) == [0]
    return out


def same(one: Path, other: Path) -> None:
    """Two runs learned the same, said the same, and hold the same state, to the bit."""
    assert rows(one) == rows(other)
    with (
        Checkpoint(one / "model.safetensors") as a,
        Checkpoint(other / "model.safetensors") as b,
    ):
        assert all(a.raw(key) == b.raw(key) for key in a.specs)
        assert a.specs == b.specs
    for name in ("parameters.safetensors", "optimizer.safetensors"):
        theirs, mine = (latest(out / "state").path / name for out in (one, other))
        assert theirs.read_bytes() == mine.read_bytes()


def struck(home: Path, out: Path, number: int) -> tuple[list[int], str]:
    """Two processes, the second sent a signal once a state is saved: exit codes, what is said."""
    both = start(home, out, 2, 1, "logs")
    until = time.monotonic() + 200
    while not latest(out / "state") and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(both[1].pid, number)
    codes = ended(both)
    (line,) = said(out.parent / "logs")
    return codes, line


def test_what_processes_cannot_share_is_refused(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    images = tmp_path / "images"
    images.mkdir()
    for k in range(2):
        Image.new("RGB", (40, 40), (90, 90 * k, 200)).save(images / f"{k}.png")
        (images / f"{k}.txt").write_text("an old lamp")
    how = config(home, tmp_path / "run", data={"images": str(images)}, run={"accumulate": 2})
    assert widened(how).run.accumulate == 6
    assert widened(how).digest() != how.digest()
    job = Job(how, home / "sd15.safetensors")
    with (
        Checkpoint(job.model) as file,
        pytest.raises(Refused, match=r"3 processes and 2 images: launch with --num_processes 2"),
    ):
        checked(file, job)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(Refused, match="instead of FSDP"):
        widened(how)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_that_a_signal_stops_are_one_that_accumulates_two(
    alone: Path, home: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    codes, line = struck(home, out, signal.SIGTERM)
    assert codes == [143, 143]
    assert "stopped after step" in line
    assert ended(start(home, out, 2, 1, "again")) == [0, 0]
    same(alone, out)
    assert max(rows(out)[-1]["spread"].values()) > 0
    assert (tmp_path / "again" / "1.log").read_text() == ""


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_other_and_one_alone_goes_on(
    alone: Path, home: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    codes, line = struck(home, out, signal.SIGKILL)
    assert codes == [1, -signal.SIGKILL]
    assert "another process of this run has ended" in line
    assert not (out / "model.safetensors").exists()
    assert ended(start(home, out, 1, 2, "again")) == [0]
    same(alone, out)
    # three draws a step are another run
    assert ended(start(home, out, 1, 3, "other")) == [2]
    (line,) = said(tmp_path / "other")
    assert "run.accumulate was 2 and is 3" in line
