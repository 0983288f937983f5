"""Patches on relatives: fine-tunes of pocket-xl, converted with the patch of pocket-xl itself.

    make bench-patch          or python bench/patch.py; start it again and it goes on
    python bench/patch.py style heavy
    python bench/patch.py --page

Each fine-tune is made by `recast train` or `recast merge` and converted from eps to flow four ways:
the patch alone, the patch and 25 or 50 steps of polish, 25 or 100 steps from nothing. All train on
what the fine-tune itself dreams (64 pictures), 16 samples a step. Figures: PSNR of 32 pictures
against the fine-tune's own from the same noise (25 steps, guidance 3), and the distance between the
fine-tune and pocket-xl as the patch's fingerprint tells it. One seed, one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

if TYPE_CHECKING:
    from torch import Tensor

    from recast.convert import Job
    from recast.recipe import Recipe

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "runs" / "bench-patch"
RESULTS = ROOT / "bench" / "results"
MODEL = "model.safetensors"
COUNT = 160  # pictures that a fine-tune is trained on


@dataclass(frozen=True)
class Tune:
    """A fine-tune: what its pictures look like, and how `recast train` is told to learn them."""

    about: str
    paint: Callable[[list[Any], Any], Tensor] | None = None
    train: Mapping[str, Any] = field(default_factory=dict)
    held: bool | None = False


def night(batch: list[Any], generator: Any) -> Tensor:
    """A style: dark and blue, with the tones reversed."""
    import torch

    from recast.pocket.world import render

    return (-0.7 * render(batch, generator) + torch.tensor([-0.25, -0.2, 0.2]).view(3, 1, 1)).clamp(
        -1, 1
    )


def other_shapes(batch: list[Any], generator: Any) -> Tensor:
    """New concepts: three of the words mean shapes that the base has never seen."""
    from recast.pocket.world import OUTLINES, SHAPES, compose, labels, star

    new = list(OUTLINES)
    new[SHAPES.index("heart")] = lambda x, y: star(x, y, points=8, outer=1.0, inner=0.7)
    new[SHAPES.index("cross")] = lambda x, y: star(x, y, points=3, outer=1.2, inner=0.3)
    new[SHAPES.index("moon")] = lambda x, y: star(x, y, points=4, outer=1.1, inner=0.35)
    return compose(labels(batch), generator, False, new)[0]


def both(batch: list[Any], generator: Any) -> Tensor:
    """The new shapes in the new style, in pastel."""
    return 0.45 * other_shapes(batch, generator).flip(1) - 0.35


LIGHT = {"rank": 16, "steps": 120, "batch": 8, "lr": 5e-4}
WHOLE = {"rank": 0, "profile": "unet", "batch": 8, "schedule": "linear"}
TUNES = {
    "style": Tune("dark, blue, tones reversed", night, LIGHT),
    "concepts": Tune("three words get new shapes", other_shapes, LIGHT),
    "merged": Tune("recast merge style concepts --weight 0.5"),
    "heavy": Tune(
        "everything trained, new shapes in pastel", both, {**WHOLE, "steps": 200, "lr": 5e-4}
    ),
    "heavier": Tune(
        "the same with a rate that does harm", both, {**WHOLE, "steps": 200, "lr": 3e-3}
    ),
}
ARMS = ("patch", "patch+25", "patch+50", "nothing 25", "nothing 100")
Row = dict[str, Any]


def recipe(**train: Any) -> Recipe:
    """The default conversion, short."""
    from recast.recipe import load, override

    return override(
        load(), objective="flow", train=train, data={"pictures": 64}, evaluate={"pictures": 32}
    )


def base_patch() -> Path:
    """Convert pocket-xl once; its patch."""
    from recast import pocket
    from recast.convert import Job

    follow(Job(pocket.path("pocket-xl"), RUNS / "base", recipe()))
    return RUNS / "base" / "patch.safetensors"


def tuned(name: str) -> Path:
    """A fine-tune's file, made if it is missing."""
    from recast import pocket
    from recast.convert import Job
    from recast.recipe import load, override

    tune, out = TUNES[name], RUNS / name
    if tune.paint is None:
        return merged(out)
    if not (out / "images.complete").exists():
        write_images(out / "images", tune)
        (out / "images.complete").touch()
    how = override(load("train"), train={**tune.train, "checkpoint_every": 1000})
    follow(
        Job(pocket.path("pocket-xl"), out / "tune", how, images=out / "images", measure=False)
    )  # fmt: skip
    return out / "tune" / MODEL


def merged(out: Path) -> Path:
    """The half of two fine-tunes."""
    from recast.adapter.merge import weights, write_merged
    from recast.checkpoint import Checkpoint

    file = out / MODEL
    if not file.exists():
        out.mkdir(parents=True, exist_ok=True)
        with Checkpoint(tuned("style")) as one, Checkpoint(tuned("concepts")) as other:
            write_merged(one, other, weights(["0.5"]), file)
    return file


def write_images(folder: Path, tune: Tune) -> None:
    """Paint and caption a fine-tune's pictures."""
    import torch
    from PIL import Image

    from recast.pocket.world import caption, scenes, to_bytes

    assert tune.paint is not None
    folder.mkdir(parents=True, exist_ok=True)
    chosen = random.Random(0).sample(scenes(held=tune.held), COUNT)
    pictures = to_bytes(tune.paint(chosen, torch.Generator().manual_seed(0)))
    for k, (scene, pixels) in enumerate(zip(chosen, pictures, strict=True)):
        Image.fromarray(pixels.numpy()).save(folder / f"{k:04d}.png")
        (folder / f"{k:04d}.txt").write_text(caption(scene) + "\n", encoding="utf-8")


def arm_job(model: Path, patch: Path, out: Path, arm: str) -> Job:
    """The conversion that an arm's name says."""
    from recast.convert import Job

    kind, _, steps = arm.replace("+", " ").partition(" ")
    how = recipe(steps=int(steps)) if steps else recipe()
    start = patch if kind == "patch" else None
    return Job(model, out, how, start=start, trains=bool(steps), far=True)


def run_arm(name: str, model: Path, patch: Path, arm: str) -> Row:
    """Convert a fine-tune one way, or find it converted."""
    folder = RUNS / name / arm.replace(" ", "-")
    share_pairs(RUNS / name, folder, arm)
    began = time.process_time()
    follow(arm_job(model, patch, folder, arm))
    report = json.loads((folder / "report.json").read_text())
    psnr = report["psnr_same_noise_db"]
    return {
        "psnr": psnr["converted"],
        "ceiling": psnr["original"],
        "drift": report["drift"]["against_original"],
        "cpu_seconds": round(time.process_time() - began, 1),
    }


def share_pairs(home: Path, folder: Path, arm: str) -> None:
    """Take the dreams of another arm of the same fine-tune: they are the same."""
    made = next((path for path in sorted(home.glob("*/pairs")) if path.parent != folder), None)
    if made is not None and arm != "patch" and not (folder / "pairs").exists():
        folder.mkdir(exist_ok=True)
        shutil.copytree(made, folder / "pairs")


def follow(job: Job) -> None:
    """Run a job to its end; notes are printed."""
    from recast.convert import run
    from recast.events import Note

    for event in run(job):
        if isinstance(event, Note):
            print(f"  {job.out.name}: {event.text}", flush=True)


def apart(model: Path, patch: Path) -> Row:
    """How far a fine-tune is from the patch's base."""
    from dataclasses import asdict

    from recast.adapter.patch import distance_to_base, read_patch
    from recast.checkpoint import Checkpoint

    with Checkpoint(model) as file:
        return asdict(distance_to_base(read_patch(patch), file))


def unlike(name: str) -> float:
    """PSNR between the fine-tune's pictures and the base's, from the same noise and prompts."""
    from recast.evaluate.agreement import agreement
    from recast.evaluate.report import load_report
    from recast.model import open_model
    from recast.pocket import path
    from recast.sample import sample_images

    shots = load_report(RUNS / name / "patch").shots
    prompts, seeds = [shot.caption for shot in shots], [shot.seed for shot in shots]
    made = [
        [p.image for p in sample_images(open_model(file), prompts, seeds=seeds, steps=25, scale=3)]
        for file in (path("pocket-xl"), tuned(name))
    ]
    return agreement(*made).mean


def page(rows: dict[str, Row]) -> str:
    """The results as Markdown."""
    lines = ["# bench/patch", "", (__doc__ or "").strip(), ""]
    lines += [f"- **{name}**: {tune.about}" for name, tune in TUNES.items()]
    lines += [
        "",
        "| fine-tune | distance, UNet | distance, patched | pictures against the base's |",
    ]
    lines[-1] += "".join(f" {arm} |" for arm in ARMS) + " ceiling |"
    lines += ["|---" * (5 + len(ARMS)) + "|"]
    for name, row in rows.items():
        figures = [f"{row['arms'][arm]['psnr']:.1f} dB" for arm in ARMS if arm in row["arms"]]
        figures += ["–"] * (len(ARMS) - len(figures))
        ceiling = next(iter(row["arms"].values()))["ceiling"]
        near = f"{row['unlike']:.1f} dB" if "unlike" in row else "–"
        cells = [name, f"{row['unet']:.3f}", f"{row['patched']:.3f}", near, *figures]
        lines.append(f"| {' | '.join(cells)} | {ceiling:.1f} dB |")
    return "\n".join([*lines, ""])


def rows_of(names: list[str]) -> Iterator[tuple[str, Row]]:
    """Every fine-tune's figures, as they come."""
    patch = base_patch()
    for name in names:
        model = tuned(name)
        row: Row = {"about": TUNES[name].about, **apart(model, patch), "arms": {}}
        for arm in ARMS:
            row["arms"][arm] = run_arm(name, model, patch, arm)
            yield name, row
        row["unlike"] = unlike(name)
        yield name, row


def main() -> None:
    import torch

    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*TUNES, []], help="fine-tunes; all of them")
    parser.add_argument("--page", action="store_true", help="only write the table again")
    given = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / "patch.json"
    rows = json.loads(path.read_text())["tunes"] if path.exists() else {}
    for name, row in () if given.page else rows_of(given.names or list(TUNES)):
        rows[name] = row
        about = {"torch": torch.__version__, "threads": 1, "device": "cpu"}
        path.write_text(json.dumps({"about": about, "tunes": rows}, indent=2) + "\n")
        (RESULTS / "patch.md").write_text(page(rows))
    (RESULTS / "patch.md").write_text(page(rows))
    print(page(rows))


if __name__ == "__main__":
    main()
