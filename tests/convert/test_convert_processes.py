"""Several processes compute one run: two of them on the CPU, over gloo."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
from tests.convert import child, small

from recast.checkpoint import Checkpoint
from recast.recipe import dump_toml
from recast.train import latest


def part(words: list[str], log: str, env: dict[str, str]) -> None:
    """Run a command as one process of several."""
    os.environ.update(env)
    child.work(words, log)


def launch(words: Iterable[object], logs: Path, count: int = 2) -> list:
    """Start a command as `accelerate launch` would, `count` times."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(child.PRELOADED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs.mkdir(parents=True, exist_ok=True)
    started = []
    for rank in range(count):
        env = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        env = env if count > 1 else {}
        log = logs / f"{rank}.log"
        process = context.Process(target=part, args=([str(w) for w in words], str(log), env))
        process.start()
        started.append(process)
    return started


def ended(started: list, within: float = 240) -> list[int]:
    """Every process's exit code."""
    until = time.monotonic() + within
    for process in started:
        process.join(max(0.1, until - time.monotonic()))
        if process.is_alive():
            process.kill()
    return [process.exitcode for process in started]


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
