"""The read-out step on SDXL's true topology and widths: its memory and its time.

    make bench-size                         what is missing; goes on where it was stopped
    python bench/size.py --device cuda      the same on a GPU
    python bench/size.py --only full-1024   one row: a base (full, 8bit, 4bit) and a side in pixels
    python bench/size.py --page             only write the tables of what is there

Weights are generated, bf16, straight into the network. A step is the default conversion's, batch 1:
the original's answer, the student's, the way back through the read-out, AdamW. Text encoders and
VAE are not in memory.

Each row is a process of its own, one thread on a CPU. `kept` is what autograd keeps for the way
back, of which `before the read-out` was kept when the last up block was entered. `alive` are the
tensors of the step that are alive at once, at most, without network, masters and moments. `above
the model` is the peak of the device beyond what it held before the step: allocated memory on a
GPU, the process's high-water mark on a CPU. Predictions are those of recast.adapter.forecast.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from _size_page import page

from recast.checkpoint import Checkpoint
from recast.header import Spec
from recast.layout import SDXL
from recast.layout.blueprint import Plan, blueprint

if TYPE_CHECKING:
    from recast.adapter import Attached
    from recast.model import Model
    from recast.train import Draw

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
NETWORK = Plan("sdxl", SDXL.unet, None, None)
SMALL = 64  # pixels of a side of the step before those that are measured
BASES, SIDES = ("full", "8bit", "4bit"), (512, 1024)
# gaps between tensors of different sizes stay with the process unless large blocks are mapped
QUIET = {"MALLOC_MMAP_THRESHOLD_": "65536"}
Row = dict[str, Any]


class Generated:
    """A checkpoint that is nowhere: each tensor is made when it is read."""

    path, files, metadata, nbytes = Path("generated-sdxl"), (), {}, 0

    def __init__(self, plan: Plan) -> None:
        self.specs: dict[str, Spec] = {}
        at = 0
        for key, shape in blueprint(plan).items():
            size = 2
            for side in shape:
                size *= side
            self.specs[key] = Spec("BF16", shape, at, at + size)
            at += size

    def raw(self, key: str) -> bytearray:
        """The bytes of one tensor."""
        import torch

        from recast.layout.generate import values

        made = values(key, self.specs[key].shape).bfloat16()
        return bytearray(made.view(torch.uint8).numpy().data)

    def sha256(self) -> str:
        """No file, so no hash."""
        return "generated"

    def close(self) -> None:
        """Nothing is open."""


def opened(base: str, device: str) -> tuple[Model, Attached]:
    """The UNet on a base, with the read-out to be trained."""
    import torch

    from recast.adapter import attach
    from recast.adapter.attach import quantiser
    from recast.adapter.decompose import zeros_full
    from recast.layout import detect
    from recast.model import open_model

    store = Generated(NETWORK)
    checkpoint = Checkpoint(store.path, store=store)
    sites = detect(checkpoint).sites("readout")
    start = zeros_full(checkpoint, sites)
    dtype, where = torch.bfloat16, torch.device(device)
    how = None if base == "full" else quantiser(start, sites, base, dtype=dtype, device=where)
    model = open_model(
        checkpoint, dtype=dtype, device=where, parts=("unet",), objective="eps", quantiser=how
    )
    return model, attach({"unet": model.unet}, start, sites)


def a_draw(model: Model, side: int) -> Draw:
    """A picture's worth of random latents, noised, under a random condition."""
    import torch

    from recast.objective import FLOW
    from recast.text.encode import Condition
    from recast.train import noised

    source = torch.Generator().manual_seed(0)
    latents, eps = torch.randn(2, 1, 4, side // 8, side // 8, generator=source).to(model.device)
    sizes = torch.tensor([[side, side, 0, 0, side, side]], dtype=torch.float32)
    condition = Condition(
        torch.randn(1, 77, 2048, generator=source), torch.randn(1, 1280, generator=source), sizes
    )
    half = torch.full((1,), 0.5, device=model.device)
    return noised(FLOW, latents, half, eps, condition.to(model.device))


def run_row(base: str, side: int, device: str) -> Row:
    """Open the network, take a step, say what it took."""
    import torch
    from _live import Kept, Live

    from recast.adapter.forecast import readout

    torch.set_num_threads(1)
    model, attached = opened(base, device)
    kept, live = Kept(model.unet), Live()
    seconds, entered = [], []
    door = model.unet.get_submodule("up_blocks")[-1]
    door.register_forward_pre_hook(lambda *_: entered.append(kept.bytes))
    draws = chain([a_draw(model, SMALL)], repeat(a_draw(model, side)))
    steps = steps_of(model, attached, draws)
    next(steps)  # the moments of AdamW are made in the first
    memory = Process() if device == "cpu" else Cuda()
    for number in range(1 if device == "cpu" else 3):  # a GPU chooses its kernels in the first
        began, wall = time.process_time(), time.perf_counter()
        with live, nullcontext() if number else kept.watching():
            next(steps)
        memory.wait()
        spent = (time.process_time() - began, time.perf_counter() - wall)
        seconds.append(spent[0] if device == "cpu" else spent[1])
    foreseen = readout(model.layout, base, side)
    return {
        "base": base, "side": side, "device": device, "name": memory.name,
        "seconds": round(seconds[-1], 2), "step_above": memory.above(), "model": memory.before,
        "kept": kept.bytes, "kept_before": max(entered), "alive": live.peak,
        "weights": weights(model), "trained": sum(p.numel() for p in attached.parameters()),
        "forecast": {
            "trunk": foreseen.trunk, "adapter": foreseen.adapter,
            "activations": foreseen.activations, "working": foreseen.working,
        },
        "torch": torch.__version__,
    }  # fmt: skip


def steps_of(model: Model, attached: Attached, draws: Iterable[Draw]) -> Iterator[object]:
    """The default conversion's steps on these draws, eps to flow."""
    from recast.convert.losses import loss_of
    from recast.convert.training import student, target_of
    from recast.objective import FLOW
    from recast.optim import build
    from recast.recipe import load
    from recast.train import train

    how = load()
    target = target_of(how, model, attached, FLOW, null=None)
    optimizer = build(how.train.optimizer, attached.parameters(), lr=how.train.lr)
    return train(student(model, FLOW), draws, loss_of(how, target, FLOW), optimizer)


def weights(model: Model) -> int:
    """Bytes of the network's frozen weights as they are held."""
    from recast.quantise import tally

    trained = sum(p.nbytes for p in model.unet.parameters() if p.requires_grad)
    return tally(model.unet, model.dtype).after - trained


class Process:
    """What this process holds, by the kernel's count."""

    def __init__(self) -> None:
        self.name = f"{cpu_name()}, one thread"
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here
        self.before = self._read("VmRSS")

    def wait(self) -> None:
        """Nothing runs on."""

    def above(self) -> int:
        """The high-water mark less what was held before."""
        return self._read("VmHWM") - self.before

    @staticmethod
    def _read(name: str) -> int:
        line = next(
            line
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith(name)
        )
        return int(line.split()[1]) * 1024


class Cuda:
    """What torch has allocated on the GPU."""

    def __init__(self) -> None:
        import torch

        self.name = torch.cuda.get_device_name()
        torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated()

    def wait(self) -> None:
        """Until the GPU has done what was asked."""
        import torch

        torch.cuda.synchronize()

    def above(self) -> int:
        """The most that was allocated, less what was before."""
        import torch

        return torch.cuda.max_memory_allocated() - self.before


def cpu_name() -> str:
    """The processor as the kernel names it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "CPU"


def rows() -> list[Row]:
    """What has been measured, on any device."""
    path = RESULTS / "size.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def predictions() -> list[Row]:
    """The forecast of every base and side, which needs no hardware."""
    from dataclasses import asdict

    from recast.adapter.forecast import readout
    from recast.layout import detect

    store = Generated(NETWORK)
    layout = detect(Checkpoint(store.path, store=store))
    return [
        {"base": base, "side": side, **asdict(found), "total": found.total}
        for side in SIDES
        for base in BASES
        for found in [readout(layout, base, side)]
    ]


def save(found: list[Row]) -> None:
    """Leave rows and page."""
    order = [f"{base}-{side}" for side in SIDES for base in BASES]
    found = sorted(found, key=lambda r: (r["device"], order.index(f"{r['base']}-{r['side']}")))
    foreseen = predictions()
    RESULTS.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"rows": found, "predictions": foreseen}, indent=1)
    (RESULTS / "size.json").write_text(text + "\n", encoding="utf-8")
    (RESULTS / "size.md").write_text(page(found, foreseen, __doc__ or ""), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--only", nargs="*", default=[], help="rows, such as 8bit-512")
    parser.add_argument("--page", action="store_true", help="only write the tables")
    parser.add_argument("--row", nargs=2, metavar=("BASE", "SIDE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.row:
        print(json.dumps(run_row(given.row[0], int(given.row[1]), given.device)))
        return
    wanted = given.only or [f"{base}-{side}" for side in SIDES for base in BASES]
    for name in () if given.page else wanted:
        base, side = name.split("-")
        place = (base, int(side), given.device)
        if not given.only and any((r["base"], r["side"], r["device"]) == place for r in rows()):
            continue
        command = [sys.executable, __file__, "--row", base, side, "--device", given.device]
        done = subprocess.run(command, env=os.environ | QUIET, stdout=subprocess.PIPE, check=True)
        row = json.loads(done.stdout)
        print(f"{name}: {row['seconds']} s, {row['step_above'] / 1e9:.2f} GB above", flush=True)
        others = [r for r in rows() if (r["base"], r["side"], r["device"]) != place]
        save([*others, row])
    save(rows())


if __name__ == "__main__":
    main()
