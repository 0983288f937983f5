"""Rebuilding streams: memory grows by a few tensors, whatever the size of the file."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tests import tiny

from recast.layout.blueprint import UNetPlan
from recast.layout.generate import generate

SOURCE = Path(__file__).parents[2] / "src"
# freed memory goes back to the system at once, so that the peak is that of what is held
ENVIRONMENT = {
    "PYTHONPATH": str(SOURCE),
    "PATH": "/usr/bin:/bin",
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
}
CHILD = """
import sys
from pathlib import Path
import torch
from recast.adapter import Adapter, entry_name, write_rebuilt
from recast.adapter.decompose import matrices
from recast.checkpoint import Checkpoint
from recast.layout import detect
from recast.lowrank import LowRank

torch.set_num_threads(1)

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if "VmHWM" in line)

def now():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if "VmRSS" in line)

path, out = map(Path, sys.argv[1:])
with Checkpoint(path) as file:
    sites = matrices(detect(file).sites("principal"))
    entries = {
        entry_name(site): LowRank(torch.randn(site.shape[0], 2), torch.randn(2, *site.shape[1:]))
        for site in sites
    }
    file.sha256()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = now()
    write_rebuilt(file, None, Adapter(entries), out)
    largest = max(spec.numel * 4 for spec in file.specs.values())
    print((peak() - before) * 1024, largest, sum(spec.nbytes for spec in file.specs.values()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["F16", "F32"])
def test_rebuilding_grows_by_three_times_the_largest_tensor(dtype: str, tmp_path: Path) -> None:
    """In fp32, in which a change is added: the weight, the change, and the sum rounded."""
    unet = UNetPlan((64, 512), (0, 1), 1, context=32 + 48, vector=40 + 6 * 16, linear=True)
    plan = replace(tiny.plan("sdxl"), unet=unet)
    path = tmp_path / "model.safetensors"
    generate(path, plan, dtype=dtype)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(path), str(tmp_path / "out.safetensors")],
        capture_output=True, text=True, check=True, timeout=300,
        env=ENVIRONMENT,
    )  # fmt: skip
    grown, largest, whole = map(int, done.stdout.split())
    assert whole > 4 * largest  # or the bound says nothing
    assert grown <= 3 * largest
