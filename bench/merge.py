"""Merging two SDXL checkpoints of 6.9 GB, beside `cp`: time, memory.

    python bench/merge.py                writes results/merge.json and results/merge.md
    python bench/merge.py --small        the pocket checkpoint twice, to see that it runs
    python bench/merge.py --folder F     where the files lie meanwhile, instead of runs: 21 GB

The first file is generated: every tensor of SDXL with its own shape, fp16, numbers from a pool of
noise; the second is a copy of it. Beside each other, in turns: `cp a out` and `cat b > /dev/null`,
which read both and write one, then `sync out`, since a merge too returns when its file is on the
disk; and a merge of both at 0.3 by a fresh Python, its start included. Before each, the files'
pages are dropped from the cache (cold), or the files are read once (warm: as much of them as memory
holds). Memory is the growth of the resident set during the merge, after the start.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recast import pocket
from recast.checkpoint import Checkpoint, write
from recast.layout import SDXL
from recast.layout.blueprint import blueprint

RESULTS = Path(__file__).parent / "results"
RUNS = Path(__file__).parents[1] / "runs" / "bench-merge"
POOL = 1 << 24
CHILD = """
import sys
from pathlib import Path
import torch
from recast.surgery.merging import write_merge
from recast.surgery.recipes import Step, parse_weights

def held(field):
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) for line in lines if field in line) * 1024

a, b, out = map(Path, sys.argv[1:])
torch.lerp(torch.randn(4), torch.randn(4), 0.5)
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = held("VmRSS")
write_merge(Step("weighted", (a, b), (parse_weights(0.3),)), out)
print(held("VmHWM") - before)
"""


def generated(path: Path) -> None:
    """A file of SDXL's tensors."""
    specs = {key: ("F16", shape) for key, shape in blueprint(SDXL).items()}
    made = torch.Generator().manual_seed(0)
    pool = (0.02 * torch.randn(POOL, generator=made)).half()

    def tensors() -> Iterator[tuple[str, Tensor]]:
        at = 0
        for key, (_, shape) in specs.items():
            count = torch.Size(shape).numel()
            at = (at + 4099) % (POOL // 2)
            yield key, pool[at:].repeat(1 + count // (POOL // 2))[:count].reshape(shape)

    write(path, specs, tensors(), {})


def prepared(files: tuple[Path, Path], *, cold: bool) -> float:
    """Bring the files into the cache or out of it; the share of their bytes that are in it."""
    for path in files:
        with path.open("rb") as file:
            if cold:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while file.read(1 << 24):
                    pass
    said = subprocess.run(["fincore", "-bnro", "res", *map(str, files)],
                          capture_output=True, text=True, check=True).stdout  # fmt: skip
    return sum(map(int, said.split())) / sum(path.stat().st_size for path in files)


def timed(command: list[str]) -> tuple[float, float, str]:
    """Seconds by the clock, seconds of the processor (system's too), and what was printed."""
    used, clock = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    wall, now = time.perf_counter() - clock, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime, said


def turn(folder: Path, files: tuple[Path, Path], *, cold: bool) -> dict[str, float]:
    """One copy and one merge."""
    a, b = map(str, files)
    out = folder / "out.safetensors"
    found = {"cold": float(cold), "cached_cp": prepared(files, cold=cold)}
    copying = [["cp", a, str(out)], ["sh", "-c", 'cat "$0" > /dev/null', b], ["sync", str(out)]]
    rows = [timed(command) for command in copying]
    found["cp_s"], found["cp_sync_s"] = sum(r[0] for r in rows[:2]), sum(r[0] for r in rows)
    found["cp_cpu_s"] = sum(row[1] for row in rows)
    out.unlink()
    found["cached_merge"] = prepared(files, cold=cold)
    wall, used, said = timed([sys.executable, "-c", CHILD, a, b, str(out)])
    found |= {"merge_s": wall, "merge_cpu_s": used, "grown": float(said)}
    out.unlink()
    found |= {"ratio": found["cp_s"] / wall, "ratio_sync": found["cp_sync_s"] / wall}
    found["load"] = os.getloadavg()[0]
    print({name: round(number, 2) for name, number in found.items()}, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="the pocket checkpoint twice")
    parser.add_argument("--turns", type=int, default=2, help="of each, cold and warm")
    parser.add_argument("--folder", type=Path, default=RUNS, help="where the files lie meanwhile")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        files = folder / "a.safetensors", folder / "b.safetensors"
        if given.small:
            shutil.copy(pocket.path("pocket-xl"), files[0])
        else:
            generated(files[0])
        shutil.copy(*files)
        with Checkpoint(files[0]) as file:
            largest, size = max(s.nbytes for s in file.specs.values()), file.nbytes
        turns = [
            turn(folder, files, cold=cold) for cold in (True, False) for _ in range(given.turns)
        ]
    facts = {
        "bytes": size, "largest": largest, "cores": os.cpu_count(), "torch": torch.__version__,
        "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "turns": turns,
    }  # fmt: skip
    if not given.small:
        (RESULTS / "merge.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        (RESULTS / "merge.md").write_text(page(facts), encoding="utf-8")


def page(facts: dict[str, Any]) -> str:
    lines = [
        "# Merging two SDXL checkpoints, beside cp",
        "",
        f"`python bench/merge.py`: two fp16 files of {facts['bytes']:,} bytes, largest "
        f"tensor {facts['largest']:,}; {facts['cores']} cores, {facts['memory'] / 2**30:.0f} GiB "
        f"of memory, torch {facts['torch']}. Seconds by the clock; of the processor in brackets.",
        "",
        "| in the cache before cp, merge | cp a, cat b | and sync | merge | times cp's speed "
        "| with sync | memory grown by | load |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {100 * t['cached_cp']:.0f} %, {100 * t['cached_merge']:.0f} % | {t['cp_s']:.1f} | "
        f"{t['cp_sync_s']:.1f} ({t['cp_cpu_s']:.1f}) | {t['merge_s']:.1f} ({t['merge_cpu_s']:.1f}) "
        f"| {t['ratio']:.2f} | {t['ratio_sync']:.2f} | {t['grown'] / 1e6:.0f} MB = "
        f"{t['grown'] / facts['largest']:.2f} x the largest tensor | {t['load']:.1f} |"
        for t in facts["turns"]
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
