"""Splitting and comparing stream: memory grows by a few tensors, whatever the size of the file."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tests import tiny
from tests.adapter.test_rebuild_memory import ENVIRONMENT

from recast.layout.blueprint import UNetPlan
from recast.layout.generate import generate

CHILD = """
import sys
from pathlib import Path
import torch
from recast.adapter import read_adapter, split, verify_split
from recast.checkpoint import Checkpoint
from recast.layout import detect
from recast.lowrank import factorize

torch.set_num_threads(int(sys.argv[3]))
factorize(torch.randn(64, 64), 4)  # what the libraries take at their first call

def held(field):
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) for line in lines if field in line) * 1024

def grown(work):
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = held("VmRSS")
    work()
    return held("VmHWM") - before

path, out = map(Path, sys.argv[1:3])
with Checkpoint(path) as file:
    sites = detect(file).sites("principal")
    first = grown(lambda: split(file, sites, 2, out))
    adapter = read_adapter(out / "adapter.safetensors")
    with Checkpoint(out / "residual.safetensors") as residual:
        second = grown(lambda: verify_split(file, residual, adapter))
    largest = max(spec.numel * 4 for spec in file.specs.values())
    print(first, second, largest, sum(spec.nbytes for spec in file.specs.values()))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("threads", [1, 4])
def test_split_and_verify_grow_by_three_times_the_largest_tensor(
    threads: int, tmp_path: Path
) -> None:
    """In fp32, in which the factors are found; with threads no more is in work at a time."""
    unet = UNetPlan((64, 512), (0, 1), 1, context=32 + 48, vector=40 + 6 * 16, linear=True)
    path = tmp_path / "model.safetensors"
    generate(path, replace(tiny.plan("sdxl"), unet=unet))
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(path), str(tmp_path / "out"), str(threads)],
        capture_output=True, text=True, check=True, timeout=300,
        env=ENVIRONMENT,
    )  # fmt: skip
    splitting, comparing, largest, whole = map(int, done.stdout.split())
    assert whole > 4 * largest  # or the bound says nothing
    assert splitting <= 3 * largest
    assert comparing <= 3 * largest
