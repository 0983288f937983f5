"""Does an assessor help distillation? Arms A0 to A8 and N1, with the control that decides.

    make bench-distill                  all arms and seeds; start it twice for two cores
    python bench/distill.py A2-1        arms by name, with wildcards: '*-0.05'
    python bench/distill.py --list
    python bench/distill.py --page      only writes the page of what is there

A row is one arm with one seed; a row that exists is not run again unless what decides it has
changed. The page is docs/ablation.md, its pictures beside it.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
from collections.abc import Iterator
from hashlib import sha256
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from _distill_arms import ARMS, GROUPS, Arm, said
from _distill_world import ROOT, RUNS, TEACHER

RESULTS = ROOT / "bench" / "results" / "distill.json"
PAGE = ROOT / "docs" / "ablation.md"
Row = dict[str, Any]


def digest(arm: Arm) -> str:
    """Names what decides an arm's rows: the teacher, the steps, the figures' definitions."""
    import _distill_assessor as assessor
    import _distill_measure as measure
    import _distill_run as run

    decides = [
        sha256(TEACHER.read_bytes()).hexdigest(), arm.kind, arm.weight,
        run.STEPS, run.BATCH, run.RATE, run.DECAY, run.CLIP, run.HALF, run.MORE, run.BOOST,
        assessor.STEPS, assessor.FITTED, assessor.SIZES, assessor.SHIFT, assessor.TOWARD,
        measure.SAMPLES, measure.GRID,
    ]  # fmt: skip
    return sha256(json.dumps(decides).encode()).hexdigest()[:12]


def rows() -> list[Row]:
    """Rows of the arms as they are now: those committed, and those made here since."""
    found: dict[tuple[str, int], Row] = {}
    if RESULTS.exists():
        committed = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
        found = {(row["arm"], row["seed"]): row for row in committed}
    for path in sorted((RUNS / "rows").glob("*.json")):
        row = json.loads(path.read_text(encoding="utf-8"))
        found[row["arm"], row["seed"]] = row
    if not TEACHER.exists():
        return []
    now = {name: digest(arm) for name, arm in ARMS.items()}
    mine = [row for row in found.values() if now.get(row["arm"]) == row["digest"]]
    order = list(ARMS)
    return sorted(mine, key=lambda row: (order.index(row["arm"]), row["seed"]))


def save(row: Row) -> None:
    """Leave the row where every process finds it."""
    path = RUNS / "rows" / f"{row['arm']}-{row['seed']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_suffix(f".{os.getpid()}")
    written.write_text(json.dumps(row) + "\n", encoding="utf-8")
    written.replace(path)


def missing(chosen: list[str]) -> Iterator[tuple[int, list[Arm]]]:
    """Seeds with the arms that they lack, group by group: the question itself first."""
    for group, seeds in GROUPS:
        for seed in range(seeds):
            done = {(row["arm"], row["seed"]) for row in rows()}
            arms = [a for a in group if a.name in chosen and (a.name, seed) not in done]
            if arms:
                yield seed, arms


def run_seed(shared: Any, arms: list[Arm], seed: int) -> None:
    """Run a seed's arms; A4 needs the weights that A2 had."""
    from _distill_run import run_row

    for arm in arms:
        mine = {(row["arm"], row["seed"]): row for row in rows()}
        if (arm.name, seed) in mine:
            continue
        frozen = None
        if arm.kind == "A4":
            treatment = Arm("A2", arm.weight)
            if (treatment.name, seed) not in mine:
                run_seed(shared, [treatment], seed)
                mine = {(row["arm"], row["seed"]): row for row in rows()}
            frozen = mine[treatment.name, seed]["weights_mean"]
        head = {"arm": arm.name, "seed": seed, "digest": digest(arm)}
        row = head | run_row(shared, arm, seed, frozen)
        save(row)
        print(f"{arm.name} seed {seed}: {row.get('error')} {row['cpu_seconds']} s", flush=True)


def run_all(chosen: list[str]) -> None:
    """Run what is missing, a seed at a time, beside another process that does the same."""
    import torch
    from _distill_run import bench

    from recast.commit import lock
    from recast.errors import Refused

    torch.set_num_threads(1)
    shared = bench()
    for seed, arms in missing(chosen):
        try:
            with lock(RUNS / "seeds" / str(seed)):
                run_seed(shared, arms, seed)
        except Refused as error:
            if "is in use by process" not in str(error):
                raise
    write_page()


def write_page() -> None:
    """The committed figures, their page and its pictures."""
    from _distill_page import page
    from _distill_plots import pictures
    from _distill_reference import about

    committed = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    found, facts = rows(), about(committed.get("about", {}))
    text = json.dumps({"about": facts}, indent=1)[:-2] + ',\n "rows": [\n'
    text += ",\n".join(json.dumps(row) for row in found) + "\n]}\n"
    RESULTS.write_text(text, encoding="utf-8")
    pictures(found, PAGE.parent)
    PAGE.write_text(page(found, facts), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("arms", nargs="*", default=["*"], help="names, with wildcards")
    parser.add_argument("--list", action="store_true", help="name the arms and leave")
    parser.add_argument("--page", action="store_true", help="write the page of what is there")
    given = parser.parse_args()
    chosen = [name for name in ARMS if any(fnmatch.fnmatch(name, g) for g in given.arms)]
    if given.page:
        write_page()
    elif given.list or not chosen:
        print(said(ARMS))
    else:
        run_all(chosen)


if __name__ == "__main__":
    main()
