"""Merging streams: memory grows by a few tensors of the files' own dtype, whatever their size."""

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
from recast import opened
from recast.checkpoint import Checkpoint
from recast.surgery.merging import write_merge
from recast.surgery.recipes import Step, parse_weights

opened.PIECE = 1 << 20
torch.set_num_threads(1)
torch.lerp(torch.randn(4), torch.randn(4), 0.5)

def held(field):
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) for line in lines if field in line) * 1024

a, b, out, how = sys.argv[1:]
models = (Path(a), Path(b)) if how == "weighted" else (Path(a), Path(b), Path(b))
step = Step(how, models, (parse_weights(0.5),))
write_merge(Step("weighted", (Path(a), Path(b)), (parse_weights(0.0),)), Path(out + "first"))
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = held("VmRSS")
write_merge(step, Path(out))
with Checkpoint(a) as file:
    print(held("VmHWM") - before, max(spec.nbytes for spec in file.specs.values()),
          sum(spec.nbytes for spec in file.specs.values()))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("how", "pieces"), [("weighted", 0), ("difference", 1 << 23)])
def test_merging_grows_by_three_times_the_largest_tensor(
    how: str, pieces: int, tmp_path: Path
) -> None:
    """Of the files, which are fp16: what is in fp32 are pieces, beside two tensors or three."""
    unet = UNetPlan((64, 512), (0, 1), 1, context=32 + 48, vector=40 + 6 * 16, linear=True)
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for seed, path in enumerate(paths):
        generate(path, replace(tiny.plan("sdxl"), unet=unet), seed=seed, dtype="F16")
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, paths), str(tmp_path / "out"), how],
        capture_output=True, text=True, check=True, timeout=300, env=ENVIRONMENT,
    )  # fmt: skip
    grown, largest, whole = map(int, done.stdout.split())
    assert whole > 4 * largest  # or the bound says nothing
    assert grown <= 3 * largest + pieces
