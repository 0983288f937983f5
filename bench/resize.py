"""Resizing a LoRA of SDXL from rank 64 to 16, by thin factors and by the dense product.

    python bench/resize.py               writes results/resize.json and results/resize.md
    python bench/resize.py --ours        without the dense path, whose figures stay
    python bench/resize.py --quick       every fortieth module, to see that it runs

The file is generated: all 788 + 264 modules of LyCORIS' preset "full" and both text encoders, fp16.
Ours is `recast.surgery.resize` on the whole file, reading, writing and hashing included. The dense
path is what the usual tools do with a module: form B A in fp32, torch.linalg.svd (thin, which is
generous: sd-scripts asks for full matrices), cut; timed once for each shape and multiplied by the
number of modules that have it, without any reading or writing. Both are process CPU time, which
other work on the machine disturbs less than the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from recast.adapter.file import low_rank_specs
from recast.checkpoint import Checkpoint, write
from recast.layout import SDXL, Site
from recast.layout.sites import sites
from recast.surgery.resize import resize
from recast.surgery.rules import cut

RESULTS = Path(__file__).parent / "results"
HIGH, LOW = 64, 16


def generated(path: Path, chosen: list[Site]) -> None:
    """Factors whose product has singular values that fall as 1 / i, in fp16."""
    specs = {}
    for site in chosen:
        specs |= low_rank_specs(site.lora, site.shape, HIGH, "F16")

    def tensors() -> Iterator[tuple[str, Tensor]]:
        made = torch.Generator().manual_seed(0)
        fall = 1 / torch.arange(1, HIGH + 1)
        for key, (_, shape) in specs.items():
            if key.endswith("alpha"):
                yield key, torch.tensor(float(HIGH))
            else:
                factor = torch.randn(shape, generator=made) * 0.02
                if "lora_up" in key:
                    factor = factor * fall.reshape(1, -1, *(1,) * (len(shape) - 2))
                yield key, factor.half()

    write(path, specs, tensors(), {"ss_base_model_version": "sdxl_base_v1-0"})


def dense(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of rank LOW from the singular values of the product."""
    u, s, vh = torch.linalg.svd(
        up.flatten(1).float() @ down.flatten(1).float(), full_matrices=False
    )
    return u[:, :LOW] * s[:LOW], vh[:LOW]


def timed_dense(path: Path, chosen: list[Site]) -> tuple[float, list[dict[str, object]]]:
    """CPU seconds of the dense path over all modules, and each shape's."""
    counts = Counter(site.shape for site in chosen)
    rows: list[dict[str, object]] = []
    total = 0.0
    torch.set_num_threads(1)  # threads that wait for each other count as work
    with Checkpoint(path) as file:
        for shape, count in counts.items():
            site = next(site for site in chosen if site.shape == shape)
            up, down = (file[f"{site.lora}.lora_{end}.weight"] for end in ("up", "down"))
            began = time.process_time()
            dense(up, down)
            took = time.process_time() - began
            total += took * count
            rows.append({"shape": shape, "modules": count, "seconds": round(took, 4)})
            print(f"{shape!s:24} {count:4} modules {took:8.3f} s each", flush=True)
    return total, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="every fortieth module")
    parser.add_argument("--ours", action="store_true", help="the dense path's figures stay")
    given = parser.parse_args()
    chosen = sites(SDXL, "lycoris-full,te1,te2")[:: 40 if given.quick else 1]
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "lora.safetensors", Path(folder) / "out.safetensors"
        generated(path, chosen)
        began, clock = time.process_time(), time.perf_counter()
        done = resize(path, [(out, cut(LOW, None, None))])[0]
        ours, wall = time.process_time() - began, time.perf_counter() - clock
        sizes = path.stat().st_size, out.stat().st_size
        print(f"{done.modules} modules: {ours:.1f} CPU s, {wall:.1f} s on the clock", flush=True)
        threads, load = torch.get_num_threads(), os.getloadavg()[0]
        if given.ours:
            before = json.loads((RESULTS / "resize.json").read_text(encoding="utf-8"))
            slow, rows = before["dense_cpu_s"], before["shapes"]
        else:
            slow, rows = timed_dense(path, chosen)
    facts = {
        "modules": done.modules, "threads": threads, "bytes": sizes,
        "ours_cpu_s": round(ours, 2), "ours_clock_s": round(wall, 2), "load": round(load, 1),
        "dense_cpu_s": round(slow, 1), "ratio": round(slow / ours, 1), "error": done.error,
        "torch": torch.__version__, "shapes": rows,
    }  # fmt: skip
    print(f"dense {slow:.0f} CPU s, {slow / ours:.0f} times ours")
    if not given.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "resize.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        (RESULTS / "resize.md").write_text(_page(facts), encoding="utf-8")


def _page(facts: dict[str, object]) -> str:
    return (
        f"# Resizing a LoRA of SDXL, rank {HIGH} to {LOW}\n\n"
        f"`python bench/resize.py`, {facts['threads']} threads, torch {facts['torch']}\n\n"
        "| | CPU seconds |\n|---|---|\n"
        f"| ours, the whole file of {facts['modules']} modules, read and written | "
        f"{facts['ours_cpu_s']} ({facts['ours_clock_s']} on the clock, with "
        f"{facts['load']} processes at work on the machine) |\n"
        "| dense SVD of every product on one thread, each shape timed once, no file | "
        f"{facts['dense_cpu_s']} |\n"
        f"| ratio | {facts['ratio']} |\n"
    )


if __name__ == "__main__":
    main()
