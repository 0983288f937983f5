"""Weights shared out among processes (FSDP): two of them on the CPU, over gloo."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tests.convert import small
from tests.convert.test_convert_processes import trained
from tests.launched import ended, launch
from torch import nn

from recast.adapter.attach import _like
from recast.checkpoint import Checkpoint
from recast.convert import sharing
from recast.errors import Refused
from recast.recipe import dump_toml, load, override
from recast.train import latest
from recast.train.shards import Shards, spread, units

FSDP = {"ACCELERATE_USE_FSDP": "true"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharing")
    small.checkpoint(folder, "sdxl", **{"recast.objective": "eps"})
    small.images(folder / "images", 6)
    return folder


def words(home: Path, out: Path, accumulate: int) -> list[object]:
    """A full fine-tune that validates, paints, averages, keeps adapters and saves states.

    AdamW divides by its moments: gradients that are all but zero, whose sign is a matter of
    rounding, move by whole steps unless eps is well above them.
    """
    how = {"rank": 0, "profile": "unet,te1", "steps": 3, "warmup": 0, "ema": 0.9}
    how |= {"accumulate": accumulate, "batch": 1, "optimizer_args": {"eps": 1e-4}}
    recipe = small.recipe(home, "eps", "train", **how)
    watch = {"validate_every": 3, "previews_every": 3, "previews": 1, "preview_steps": 1}
    recipe = override(recipe, watch=watch, save={"every": 3})
    path = home / f"{out.name}.toml"
    path.write_text(dump_toml(recipe), encoding="utf-8")
    file = home / "sdxl.safetensors"
    return ["train", file, home / "images", "--recipe", path, "--out", out, "--device", "cpu"]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def accelerated(given: list[object]) -> subprocess.CompletedProcess[str]:
    """Run a command in two processes by `accelerate launch --use_fsdp`."""
    how = "--use_fsdp --fsdp_version 2 --num_processes 2 --num_machines 1 --mixed_precision no"
    command = [sys.executable, "-m", "accelerate.commands.launch", *how.split()]
    command += ["--dynamo_backend", "no", "--main_process_port", str(free_port()), "-m", "recast"]
    command += [str(word) for word in given]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, capture_output=True, text=True, timeout=500, env=env)


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
    """Sums of gradients and their norms round in another order, so bits differ and no more.

    What was stopped goes on with the same bytes, and by one process without FSDP as that run.
    """
    one, two, out, other = (home / name for name in ("one", "two", "out", "other"))
    assert ended(launch(words(home, one, 4), home / "l1", 1), 400) == [0]
    ran = accelerated(words(home, two, 2))
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.count("weights are shared out among 2 processes") == 1
    assert apart(one, two) < 1e-4
    states = [latest(run / "state") for run in (one, two)]
    for name in ("parameters", "optimizer", "ema"):
        a, b = (read(state.path / f"{name}.safetensors") for state in states if state)
        assert {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}
    texts = [(run / "log.jsonl").read_text(encoding="utf-8") for run in (one, two)]
    lines = [[json.loads(line) for line in text.splitlines()] for text in texts]
    assert [row.keys() for row in lines[0]] == [row.keys() for row in lines[1]]
    for a, b in zip(*lines, strict=True):
        assert b["losses"] == pytest.approx(a["losses"], rel=1e-4)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
    saved = sorted(path.name for path in (two / "saved").iterdir())
    assert saved == sorted(path.name for path in (one / "saved").iterdir())

    given = words(home, out, 2)
    stopped(given, out, home / "l3")
    shutil.copytree(out, other)
    assert ended(launch(given, home / "l4", **FSDP), 400) == [0, 0]
    assert trained(out) == trained(two)
    assert ended(launch(words(home, other, 4), home / "l5", 1), 400) == [0]
    assert 0 < apart(one, other) < 1e-4


def restarted(rank: int, port: int) -> None:
    """One of two processes that set shared weights, step their rows, and gather them."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )  # fmt: skip
    torch.distributed.init_process_group("gloo")
    net = nn.Module()
    net.resnets, net.out = nn.ModuleList([nn.Linear(3, 5)]), nn.Linear(5, 1)
    spread(net, torch.device("cpu"))
    shards = Shards.of(dict(net.named_parameters()))
    wanted = {}
    for name, parameter in net.named_parameters():
        value = torch.arange(parameter.numel(), dtype=torch.float32).view(parameter.shape)
        with torch.no_grad():
            parameter.copy_(_like(parameter, value))
            assert torch.equal(shards.rows[name], shards.cut(name, value))
            shards.rows[name].add_(1)
        wanted[name] = value + 1
    for name, value in shards.gathered(shards.rows):
        assert torch.equal(value, wanted[name])
    assert shards.specs(shards.rows)["out.weight"] == ("F32", (1, 5))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_rows_are_where_the_network_looks() -> None:
    """Also where rows are uneven, or a process has none: what a run that goes back relies on."""
    context = multiprocessing.get_context("forkserver")
    port = free_port()
    started = [context.Process(target=restarted, args=(rank, port)) for rank in range(2)]
    for process in started:
        process.start()
    assert ended(started) == [0, 0]


FULL = {"rank": 0, "profile": "unet"}


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"rank": 4}, "factors are small"),
        ({**FULL, "optimizer": "prodigy", "lr": 1.0}, r"train\.optimizer prodigy .* adamw or lion"),
        ({**FULL, "masters": "bf16"}, r"train\.masters bf16 .* set it to fp32"),
        ({**FULL, "precision": "fp16"}, r"train\.precision fp16"),
        ({**FULL, "base": "8bit"}, r"train\.base 8bit"),
        ({**FULL, "profile": "OUT", "widen": "IN"}, r"train\.widen IN"),
        ({**FULL, "compile": True}, r"train\.compile true"),
    ],
)
def test_what_needs_whole_tensors_is_refused(train: dict[str, object], said: str) -> None:
    with pytest.raises(Refused, match=said):
        sharing.check(override(load("train"), train=train))


def test_what_can_be_shared_out_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = override(load("train"), train={**FULL, "optimizer": "lion", "lr": 1e-5})
    sharing.check(recipe)
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    with pytest.raises(Refused, match="fsdp_offload_params"):
        sharing.check(recipe)


def test_rows_are_cut_as_torch_cuts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 5 rows for 3 processes the last gets 1; of 2 rows none; others' tensors stay whole."""

    class Held:
        shape = torch.Size((5, 2))

    monkeypatch.setattr("recast.train.shards.DTensor", Held)
    shards = Shards({"w": Held(), "b": nn.Parameter(torch.zeros(5, 2))}, {})  # type: ignore[dict-item]
    whole = torch.arange(10.0).view(5, 2)
    monkeypatch.setenv("WORLD_SIZE", "3")
    found = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        found.append(shards.cut("w", whole))
        assert torch.equal(shards.cut("o.state.0.exp_avg", whole), found[-1])
        for name in ("b", "o.state.1.exp_avg", "rng.cpu"):
            assert torch.equal(shards.cut(name, whole), whole)
    assert [len(rows) for rows in found] == [2, 2, 1]
    assert torch.equal(torch.cat(found), whole)
    Held.shape = torch.Size((2,))
    assert shards.cut("w", torch.ones(2)).shape == (0,)
    assert shards.cut("o.state.0.step", torch.tensor(3.0)) == 3


def test_blocks_are_gathered_one_by_one() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.resnets = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
            self.to_out = nn.ModuleList([nn.Linear(1, 1)])

    net = nn.Module()
    net.conv_in, net.mid_block = nn.Linear(1, 1), Block()
    net.down_blocks = nn.ModuleList([Block()])
    names = {id(module): name for name, module in net.named_modules()}
    assert [names[id(unit)] for unit in units(net)] == [
        "down_blocks.0.resnets.1", "down_blocks.0.resnets.0", "down_blocks.0",
        "mid_block.resnets.1", "mid_block.resnets.0", "mid_block",
    ]  # fmt: skip
