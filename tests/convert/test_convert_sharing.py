"""Weights shared out among processes (FSDP): two of them on the CPU, over gloo."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from tests.convert import small
from tests.convert.test_convert_processes import ended, launch, said, trained

from recast import processes
from recast.checkpoint import Checkpoint
from recast.convert import sharing
from recast.errors import Refused
from recast.recipe import Recipe, dump_toml, load, override
from recast.train import latest
from recast.train.shards import Shards, units

FSDP = {"ACCELERATE_USE_FSDP": "true"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharing")
    small.checkpoint(folder, "sdxl", **{"recast.objective": "eps"})
    small.images(folder / "images", 6)
    return folder


def words(home: Path, out: Path, **train: object) -> list[object]:
    """A full fine-tune that validates, paints, averages, keeps adapters and saves states."""
    how = {"rank": 0, "profile": "unet,te1", "steps": 6, "warmup": 0, "ema": 0.9, **train}
    recipe = small.recipe(home, "eps", "train", **how)
    watch = {"validate_every": 3, "previews_every": 3, "previews": 1, "preview_steps": 1}
    recipe = override(recipe, watch=watch, save={"every": 3})
    path = home / f"{out.name}.toml"
    path.write_text(dump_toml(recipe), encoding="utf-8")
    file = home / "sdxl.safetensors"
    return ["train", file, home / "images", "--recipe", path, "--out", out, "--device", "cpu"]


def read(path: Path) -> dict[str, torch.Tensor]:
    with Checkpoint(path) as file:
        return {key: file[key] for key in file.specs}


def apart(one: Path, two: Path) -> float:
    """How far the trained changes of two runs are apart, in the first one's norm."""
    a, b = (read(out / "adapter.safetensors") for out in (one, two))
    assert a.keys() == b.keys()
    off = sum((a[k].double() - b[k].double()).square().sum() for k in a)
    return (off / sum(a[k].double().square().sum() for k in a)).sqrt().item()


def stopped(given: list[object], out: Path, logs: Path) -> None:
    """Launch two processes with FSDP and stop them after their first state."""
    started = launch(given, logs, **FSDP)
    until = time.monotonic() + 400
    while not latest(out / "state") and time.monotonic() < until:
        time.sleep(0.05)
    os.kill(started[1].pid, signal.SIGTERM)
    assert ended(started, 400) == [143, 143], (logs / "0.log").read_text()


@pytest.mark.slow
def test_shared_out_weights_train_as_one_process_does(home: Path) -> None:
    """Sums of gradients and norms round in another order, so the runs agree to a tolerance.

    With one batch for each of two processes there is one order only: without a clip, one result.
    """
    one, two, out, other = (home / name for name in ("one", "two", "out", "other"))
    assert ended(launch(words(home, one, accumulate=4), home / "l1", 1), 400) == [0]
    assert ended(launch(words(home, two, accumulate=2), home / "l2", **FSDP), 400) == [0, 0], (
        (home / "l2" / "0.log").read_text()
    )
    assert (home / "l2" / "1.log").read_text() == ""
    assert "weights are shared out" in (home / "l2" / "0.log").read_text()
    assert apart(one, two) < 1e-3
    states = [latest(run / "state") for run in (one, two)]
    for name in ("parameters", "optimizer", "ema"):
        a, b = (read(state.path / f"{name}.safetensors") for state in states if state)
        assert {k: (v.dtype, v.shape) for k, v in a.items()} == {
            k: (v.dtype, v.shape) for k, v in b.items()
        }
    lines = [[json.loads(x) for x in (run / "log.jsonl").open()] for run in (one, two)]
    assert [row.keys() for row in lines[0]] == [row.keys() for row in lines[1]]
    for a, b in zip(*lines, strict=True):
        assert b["losses"] == pytest.approx(a["losses"], rel=1e-3)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)
    saved = sorted(path.name for path in (two / "saved").iterdir())
    assert saved == sorted(path.name for path in (one / "saved").iterdir())

    # stopped and gone on with: the same bytes; by one process without FSDP: the same run
    given = words(home, out, accumulate=2)
    stopped(given, out, home / "l3")
    shutil.copytree(out, other)
    assert ended(launch(given, home / "l4", **FSDP), 400) == [0, 0]
    assert trained(out) == trained(two)
    assert ended(launch(words(home, other, accumulate=4), home / "l5", 1), 400) == [0]
    assert 0 < apart(one, other) < 1e-3
