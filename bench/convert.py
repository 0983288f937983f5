"""Converts the pocket checkpoints in every direction, the reference recipe beside ours.

    make bench-convert            all arms, resumable: an arm whose report exists is not run again
    python bench/convert.py xl-flow xl-flow-reference

User images: 350 pictures of the pocket world without star, ring and moon, a third watermarked.
Figures are the run's own report: 96 pictures from the same noise, 25 steps, guidance 3.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "runs" / "bench"
RESULTS = ROOT / "bench" / "results"
ABSENT = ("star", "ring", "moon")
FIGURES = ("psnr_same_noise_db", "alignment", "retention", "leakage")


@dataclass(frozen=True)
class Arm:
    """One conversion: model, objective, recipe, and whether it sees the user's images."""

    model: str
    objective: str
    recipe: str = "default"
    images: bool = True


ARMS = {
    "xl-flow": Arm("pocket-xl", "flow"),
    "xl-flow-dreams": Arm("pocket-xl", "flow", images=False),
    "xl-flow-reference": Arm("pocket-xl", "flow", "flow-dadaptlion"),
    "xl-v-zsnr": Arm("pocket-xl", "v-zsnr"),
    "15-flow": Arm("pocket-15", "flow"),
    "15-flow-reference": Arm("pocket-15", "flow", "flow-dadaptlion"),
    "15-v-zsnr": Arm("pocket-15", "v-zsnr"),
}


def images() -> Path:
    """The user's folder of images, painted once."""
    from recast.pocket.world import SHAPES, scenes, write_folder

    folder = RUNS / "images"
    if not (RUNS / "images.complete").exists():
        absent = {SHAPES.index(name) for name in ABSENT}
        seen = [scene for scene in scenes(held=False) if scene.shape not in absent]
        write_folder(folder, random.Random(0).sample(seen, 350), seed=0, marked_share=1 / 3)
        (RUNS / "images.complete").touch()
    return folder


def run_arm(name: str, arm: Arm) -> dict[str, object]:
    """Convert, or find it converted; returns the arm's figures."""
    from recast import console, pocket
    from recast.convert import Job, run
    from recast.errors import Diverged
    from recast.recipe import load, override

    out = RUNS / name
    recipe = override(load(arm.recipe), objective=arm.objective)
    job = Job(pocket.path(arm.model), out, recipe, images=images() if arm.images else None)
    began, found = time.monotonic(), {"model": arm.model, "recipe": arm.recipe}
    try:
        console.follow(run(job))
    except Diverged as error:
        return {**found, "diverged": str(error)}
    report = json.loads((out / "report.json").read_text())
    seconds = round(time.monotonic() - began, 1)
    timing = out / "seconds"
    if not timing.exists():
        timing.write_text(str(seconds))
    found |= {key: report[key] for key in FIGURES}
    return {**found, "drift": report["drift"]["ratio"], "seconds": float(timing.read_text())}


def table(rows: dict[str, dict[str, object]]) -> Iterable[str]:
    """The results as Markdown."""
    yield "| arm | same-noise PSNR (ceiling) | alignment | retention | watermarks | seconds |"
    yield "|---|---|---|---|---|---|"
    for name, row in rows.items():
        if "diverged" in row:
            yield f"| {name} | {row['diverged']} | | | | |"
            continue
        psnr, align, keep, leak = (row[key] for key in FIGURES)
        yield (
            f"| {name} | {psnr['converted']:.1f} dB ({psnr['original']:.1f}) "
            f"| {align['converted']:.3f} of {align['original']:.3f} "
            f"| {keep['converted']:.3f} of {keep['original']:.3f} "
            f"| {leak['converted']:.1%} | {row['seconds']:.0f} |"
        )


def main() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    chosen = sys.argv[1:] or list(ARMS)
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / "convert.json"
    rows = json.loads(path.read_text())["arms"] if path.exists() else {}
    for name in chosen:
        rows[name] = run_arm(name, ARMS[name])
        rows = {key: rows[key] for key in ARMS if key in rows}
        about = {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": "cpu"}
        path.write_text(json.dumps({"about": about, "arms": rows}, indent=2) + "\n")
        text = "\n".join(["# bench/convert", "", (__doc__ or "").strip(), "", *table(rows), ""])
        (RESULTS / "convert.md").write_text(text)
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
