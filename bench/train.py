"""A training step of Recast, of PEFT on diffusers and of LyCORIS on diffusers, in one run.

    make bench-train                   every row; goes on where it was stopped
    python bench/train.py --only quarter-locon-off-1      world-network-checkpointing-threads
    python bench/train.py --again      measure rows anew
    python bench/train.py --memory     only the predictions of memory and their check
    python bench/train.py --page       only write the tables of what is there

Same UNet (diffusers'), same layers, rank, dtype, batch, optimizer (AdamW), clip, draws. `locon` are
factors on all of kohya's layers, convolutions included; `lora` on the linear ones alone. Worlds:
`pocket`, the checkpoint that ships, batch 4, rank 16; `quarter`, SDXL's true topology at a quarter
of its width (96, 160, 320; group norms want multiples of 32), generated weights, 512 pixels, batch
1, rank 16.

Every arm is a process of its own, and a step is asked of each in turn (A B C A B C …), so what else
the machine does meets all alike. Times are medians. On one thread they are CPU time; with two, CPU
time counts both and waiting, so wall time is shown too. Memory: `tensors` is what the step makes
and is alive at once at most, masters, moments and weights besides. Every arm has the system's
allocator.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from _train_page import page

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
ARMS = ("recast", "peft", "lycoris")
WORLDS, NETWORKS = ("pocket", "quarter"), ("locon", "lora")
CHECKPOINTING, THREADS = ("off", "on"), ("1", "2")
ROUNDS = {"pocket": 41, "quarter": 7}
Row = dict[str, Any]


class Arm:
    """A process that takes a step when asked."""

    def __init__(self, name: str, row: tuple[str, ...]) -> None:
        world, network, checkpointing, threads = row
        command = [
            sys.executable, str(Path(__file__).with_name("_train_arms.py")),
            name, world, network, checkpointing, "fp32", threads,
        ]  # fmt: skip
        self.name = name
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": threads},
        )  # fmt: skip
        self.about = self.answer()

    def ask(self, what: str) -> Row:
        """What the process answers to a word."""
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> Row:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the arm {self.name} ended with {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def measure(name: str) -> Row:
    """One row: every arm's median times and memory, steps asked of each in turn."""
    row = tuple(name.split("-"))
    arms = [Arm(arm, row) for arm in ARMS]
    try:
        times: dict[str, list[Row]] = {arm.name: [] for arm in arms}
        for _ in range(ROUNDS[row[0]]):
            for arm in arms:
                times[arm.name].append(arm.ask("step"))
        memory = {arm.name: arm.ask("memory") for arm in arms}
        about = arms[0].about
    finally:
        for arm in arms:
            arm.close()
    found: Row = {"row": name, "device": machine(), "torch": torch_version(), **about}
    for arm, each in times.items():
        found[arm] = {
            "cpu": round(statistics.median(t["cpu"] for t in each), 5),
            "wall": round(statistics.median(t["wall"] for t in each), 5),
            "spread": round(spread([t["cpu"] for t in each]), 3),
            **memory[arm],
        }
    return found


def spread(values: list[float]) -> float:
    """The middle half of the values, as a share of their median."""
    low, middle, high = statistics.quantiles(values, n=4)
    return (high - low) / middle


def machine() -> str:
    """The processor as the kernel names it."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "CPU"


def torch_version() -> str:
    from importlib.metadata import version

    return ", ".join(f"{name} {version(name)}" for name in LIBRARIES)


LIBRARIES = ("torch", "diffusers", "peft", "lycoris-lora")


def load() -> Row:
    """What has been measured and predicted."""
    path = RESULTS / "train.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": []}


def save(found: Row) -> None:
    """Leave figures and page."""
    order = names()
    found["rows"].sort(key=lambda row: order.index(row["row"]))
    RESULTS.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=1)
    (RESULTS / "train.json").write_text(text + "\n", encoding="utf-8")
    (RESULTS / "train.md").write_text(page(found, __doc__ or ""), encoding="utf-8")


def names() -> list[str]:
    """Every row's name."""
    return ["-".join(row) for row in product(WORLDS, NETWORKS, CHECKPOINTING, THREADS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="*", default=[], help="rows, such as pocket-lora-on-1")
    parser.add_argument("--again", action="store_true", help="measure what is there already, too")
    parser.add_argument("--memory", action="store_true", help="only what concerns memory")
    parser.add_argument("--page", action="store_true", help="only write the tables")
    given = parser.parse_args()
    for name in () if given.page or given.memory else (given.only or names()):
        found = load()
        if not (given.again or given.only) and any(r["row"] == name for r in found["rows"]):
            continue
        row = measure(name)
        found["rows"] = [r for r in found["rows"] if r["row"] != name] + [row]
        save(found)
        print(f"{name}: {told(row)}", flush=True)
    if not given.page and not given.only:
        from _train_memory import checked, predicted

        found = load()
        found["memory"] = {"predicted": list(predicted()), "checked": list(checked())}
        save(found)
    save(load())
    print((RESULTS / "train.md").read_text(encoding="utf-8"))


def told(row: Row) -> str:
    """Ratios on one line."""
    mine = row["recast"]
    return ", ".join(
        f"{arm} {row[arm]['cpu'] / mine['cpu']:.2f}x CPU, "
        f"{row[arm]['wall'] / mine['wall']:.2f}x wall, "
        f"{row[arm]['alive'] / mine['alive']:.2f}x memory"
        for arm in ARMS[1:]
    )


if __name__ == "__main__":
    main()
