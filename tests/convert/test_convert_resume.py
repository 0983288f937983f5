"""The same command goes on where it was stopped, and ends with the bytes of one never stopped."""

from __future__ import annotations

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from tests.convert import command, small

from recast import convert
from recast.commit import lock
from recast.convert import Job, run
from recast.errors import Refused, Stopped
from recast.events import Stage, Tick
from recast.recipe import override
from recast.train import append, latest

STEPS = 3
HOW: dict[str, dict[str, object]] = {
    "adamw-ema": {"ema": 0.9, "accumulate": 2, "warmup": 2},
    "dadaptlion": {"optimizer": "dadaptlion", "lr": 1.0, "rank": 2, "profile": "principal"},
    "prodigyplus": {"optimizer": "prodigyplus", "lr": 1.0},
    "edm2-widened": {
        "weighting": "edm2",
        "distance": "huber",
        "widen": "TIME",
        "widen_at": 0.4,
        "rates": {"OUT": 2.0},
    },
    "loss-aware": {"times": "loss-aware", "accumulate": 2},
}


class Stop:
    """Asks for a stop, as Ctrl-C does, once the given stage has made a tick."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.there = False
        self.asked = 0

    def __call__(self) -> int:
        return self.asked

    def follow(self, job: Job) -> None:
        for event in run(job, self):
            if isinstance(event, Stage):
                self.there = event.name == self.stage
            elif isinstance(event, Tick) and self.there:
                self.asked = signal.SIGINT


class Killed(BaseException):
    """Nothing catches it, as nothing catches a kill."""


def job(home: Path, out: Path, **train: object) -> Job:
    recipe = small.recipe(home, "flow", steps=STEPS, **train)
    return Job(home / "sdxl.safetensors", out, recipe, images=home / "images", measure=False)


@pytest.mark.parametrize("how", HOW)
def test_stopped_after_every_step_it_ends_with_the_same_bytes(
    how: str, home: Path, tmp_path: Path
) -> None:
    small.convert(job(home, tmp_path / "whole", **HOW[how]))
    broken = job(home, tmp_path / "broken", **HOW[how], checkpoint_every=3)
    for step in range(1, STEPS + 1):
        with pytest.raises(Stopped, match=f"stopped after step {step};") as stop:
            Stop("train").follow(broken)
        assert stop.value.code == 130
    small.convert(broken)
    names = (*small.NAMES, "log.jsonl")
    names += ("initial.safetensors",) if "rank" in HOW[how] else ()
    before = small.contents(tmp_path / "whole", names)
    assert small.contents(tmp_path / "broken", names) == before


def test_a_kill_before_older_states_are_pruned_leaves_none_of_them(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = tmp_path / "broken" / "state"

    def killed(doomed: Path) -> None:
        found = latest(states)
        if found and found.step == STEPS:
            raise Killed
        shutil.rmtree(doomed)

    broken = job(home, tmp_path / "broken", checkpoint_every=1)
    with monkeypatch.context() as patch:
        patch.setattr("recast.train.state._remove", killed)
        with pytest.raises(Killed):
            small.convert(broken)
    assert len(list(states.iterdir())) == STEPS
    small.convert(broken)
    assert len(list(states.iterdir())) == 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_command_after_the_step_with_its_state_saved(
    number: int,
    code: int,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[train]\nsteps = 4\nbatch = 2\n", encoding="utf-8")
    out = tmp_path / "run"
    words = ["train", home / "sd15.safetensors", home / "images", "--out", out]

    def log(file: object, line: dict[str, object]) -> None:
        append(file, line)  # type: ignore[arg-type]
        if line["step"] == 2:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(convert.training, "append", log)
    before = signal.getsignal(number)
    command.run([*words, "--recipe", recipe], code=code)
    assert signal.getsignal(number) is before
    found = latest(out / "state")
    assert found is not None
    assert found.step == 2
    told = capfd.readouterr().err
    assert "stopped after step 2; the same command goes on there." in told
    assert "Traceback" not in told
    monkeypatch.undo()
    command.run([*words, "--recipe", recipe])
    assert (out / "model.safetensors").exists()


def test_a_signal_while_measuring_ends_the_command(home: Path, tmp_path: Path) -> None:
    small.convert(job(home, tmp_path))
    whole = replace(job(home, tmp_path), measure=True)
    with pytest.raises(Stopped, match="while measuring"):
        Stop("paint and compare").follow(whole)
    assert not (tmp_path / "report.json").exists()


@pytest.mark.parametrize(
    ("other", "key"),
    [
        ({"train": {"lr": 1e-4}}, "recipe.train.lr 0.001 → 0.0001"),
        ({"objective": "v-zsnr"}, "objective flow → v-zsnr"),
        ({"seed": 5}, "recipe.train.seed 0 → 5"),
    ],
)
def test_another_recipe_in_the_same_folder_is_refused_by_name(
    other: dict, key: str, home: Path, started: Path
) -> None:
    first = job(home, started)
    before = tree(started)
    with pytest.raises(Refused) as refusal:
        small.convert(replace(first, recipe=override(first.recipe, **other)))
    assert key in str(refusal.value)
    assert "--force" in str(refusal.value)
    assert tree(started) == before


def test_another_model_or_other_images_are_refused_by_name(
    home: Path, started: Path, tmp_path: Path
) -> None:
    first = job(home, started)
    before = tree(started)
    with pytest.raises(Refused, match="model "):
        small.convert(replace(first, model=home / "sd15.safetensors"))
    with pytest.raises(Refused, match="images "):
        small.convert(replace(first, images=small.images(tmp_path / "two", 2)))
    assert tree(started) == before


def test_force_starts_the_other_run_anew(home: Path, tmp_path: Path) -> None:
    small.convert(job(home, tmp_path / "one", rank=2, profile="principal"))
    other = job(home, tmp_path / "one", lr=1e-4)
    small.convert(replace(other, force=True))
    small.convert(replace(other, out=tmp_path / "two"))
    assert small.contents(tmp_path / "one") == small.contents(tmp_path / "two")
    assert not (tmp_path / "one" / "initial.safetensors").exists()


def test_a_finished_run_is_left_as_it_is(home: Path, started: Path) -> None:
    small.convert(job(home, started))
    before = tree(started)
    small.convert(job(home, started))
    assert tree(started) == before


def test_saving_more_often_or_recomputing_is_no_other_run(home: Path, started: Path) -> None:
    small.convert(job(home, started, checkpoint_every=2))
    small.convert(job(home, started, recompute=True))


def test_a_second_process_in_the_same_folder_is_refused(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    with lock(out):
        words = ["convert", home / "sdxl.safetensors", "--images", home / "images"]
        command.run([*words, "--out", out], code=2)
    assert f"in use by process {os.getpid()}" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == [".lock"]


@pytest.fixture(scope="module")
def started(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    out = tmp_path_factory.mktemp("started")
    small.convert(job(home, out))
    return out


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file's size and time of change."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }
