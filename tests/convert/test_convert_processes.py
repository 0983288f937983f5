"""Several processes compute one run: two of them on the CPU, over gloo."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
from tests.convert import small
from tests.launched import ended, launch, said

from recast.checkpoint import Checkpoint
from recast.recipe import dump_toml
from recast.train import latest


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    small.checkpoint(folder, "sdxl", **{"recast.objective": "eps"})
    small.images(folder / "images", 6)
    return folder


def words(home: Path, out: Path, **train: object) -> list[object]:
    how = {"rank": 2, "profile": "principal", "steps": 3, "warmup": 0, **train}
    recipe = home / f"{out.name}.toml"
    recipe.write_text(dump_toml(small.recipe(home, "eps", "train", **how)), encoding="utf-8")
    file = home / "sdxl.safetensors"
    return ["train", file, home / "images", "--recipe", recipe, "--out", out, "--device", "cpu"]


def logged(out: Path) -> list[dict]:
    lines = (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "pace"} for line in lines]


def trained(out: Path) -> dict[str, bytes]:
    with Checkpoint(out / "adapter.safetensors") as file:
        return {key: bytes(file.raw(key)) for key in file.specs}


def test_two_processes_are_one_that_accumulates_two(home: Path) -> None:
    one, two = home / "one", home / "two"
    assert ended(launch(words(home, one, accumulate=4), home / "logs1", 1)) == [0]
    assert ended(launch(words(home, two, accumulate=2), home / "logs2", 2)) == [0, 0]
    assert trained(one) == trained(two)
    assert small.contents(one, ("model.safetensors",)) == small.contents(
        two, ("model.safetensors",)
    )
    assert logged(one) == logged(two)
    assert (home / "logs2" / "1.log").read_text() == ""


def test_more_processes_than_images_end_with_one_sentence(home: Path) -> None:
    small.images(home / "single", 1)
    given, out = words(home, home / "few"), home / "few"
    given[2] = home / "single"
    assert ended(launch(given, home / "logs3")) == [2, 2]
    (line,) = said(home / "logs3")
    assert "2 processes and 1 images" in line
    assert not out.exists()


@pytest.mark.slow
def test_a_verb_that_cannot_be_shared_is_refused_once(home: Path) -> None:
    given = ["dream", home / "sdxl.safetensors", "--out", home / "dreamt"]
    assert ended(launch(given, home / "logs4")) == [2, 2]
    (line,) = said(home / "logs4")
    assert "share train, convert and distill" in line


@pytest.mark.slow
def test_a_signal_to_one_ends_both_and_one_process_goes_on(home: Path) -> None:
    whole, out = home / "whole", home / "stopped"
    assert ended(launch(words(home, whole, accumulate=2, steps=8), home / "logs5", 1)) == [0]
    started = launch(words(home, out, accumulate=1, steps=8), home / "logs6")
    until = time.monotonic() + 200
    while not latest(out / "state") and time.monotonic() < until:
        time.sleep(0.05)
    os.kill(started[1].pid, signal.SIGTERM)
    assert ended(started) == [143, 143]
    assert len(said(home / "logs6")) == 1
    assert not (out / "adapter.safetensors").exists()
    assert ended(launch(words(home, out, accumulate=2, steps=8), home / "logs7", 1)) == [0]
    assert trained(out) == trained(whole)
    assert logged(out) == logged(whole)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_is_killed_takes_the_other_with_it(home: Path, victim: int) -> None:
    """The first one hosts the store that the others would ask why."""
    out, logs = home / f"killed{victim}", home / f"logs8{victim}"
    started = launch(words(home, out, steps=30), logs)
    until = time.monotonic() + 200
    while not latest(out / "state") and time.monotonic() < until:
        time.sleep(0.05)
    os.kill(started[victim].pid, signal.SIGKILL)
    assert ended(started)[1 - victim] == 1
    (line,) = said(logs)
    assert "another process of this run has ended" in line


@pytest.mark.slow
@pytest.mark.parametrize("how", [{"weighting": "edm2"}, {"times": "loss-aware"}])
def test_what_is_learned_beside_is_shared_too(home: Path, how: dict[str, object]) -> None:
    name = "-".join(map(str, how.values()))
    one, two = home / f"{name}-1", home / f"{name}-2"
    assert ended(launch(words(home, one, accumulate=2, **how), home / f"l1{name}", 1)) == [0]
    assert ended(launch(words(home, two, accumulate=1, **how), home / f"l2{name}", 2)) == [0, 0]
    assert trained(one) == trained(two)
    assert logged(one) == logged(two)
    # nothing is left to do: the first process is there until the others know
    assert ended(launch(words(home, two, accumulate=1, **how), home / f"l3{name}", 2)) == [0, 0]


@pytest.mark.slow
def test_a_conversion_from_dreams_is_shared(home: Path) -> None:
    found = []
    for name, accumulate, count in (("alone", 2, 1), ("both", 1, 2)):
        out = home / name
        recipe = home / f"{name}.toml"
        how = small.recipe(home, "flow", accumulate=accumulate)
        recipe.write_text(dump_toml(how), encoding="utf-8")
        given = ["convert", home / "sdxl.safetensors", "--to", "flow", "--recipe", recipe]
        given += ["--out", out, "--device", "cpu", "--seed", "0"]
        assert ended(launch(given, home / f"logs-{name}", count)) == [0] * count
        found.append(small.contents(out))
    assert found[0] == found[1]
