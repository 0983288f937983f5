"""Patches on relatives: fine-tunes of pocket-xl, converted with the patch of pocket-xl itself.

    make bench-patch          or python bench/patch.py; start it again and it goes on
    python bench/patch.py style heavy
    python bench/patch.py --page

Each fine-tune is made by `recast train` or `recast merge` and converted from eps to flow five ways:
the patch alone, the patch and 25 or 50 steps of polish (recipe polish), 25 or 100 steps from
nothing (recipe default). All train on what the fine-tune itself dreams (64 pictures), 16 samples a
step. Figures: PSNR of 16 pictures against the fine-tune's own from the same noise (25 steps,
guidance 3; half of them of combinations that pocket-xl never saw), and the distance between the
fine-tune and pocket-xl as the patch's fingerprint tells it. One seed, one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
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
PICTURES = 16  # that are compared


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


LIGHT = {"rank": 16, "steps": 100, "batch": 8, "lr": 5e-4}
WHOLE = {"rank": 0, "profile": "unet", "batch": 8, "schedule": "linear"}
TUNES = {
    "style": Tune("dark, blue, tones reversed", night, LIGHT),
    "concepts": Tune("three words get new shapes", other_shapes, LIGHT),
    "merged": Tune("recast merge style concepts --weight 0.5"),
    "heavy": Tune(
        "everything trained, new shapes in pastel", both, {**WHOLE, "steps": 120, "lr": 5e-4}
    ),
    "harder": Tune("the same with a higher rate", both, {**WHOLE, "steps": 120, "lr": 1.5e-3}),
    "heavier": Tune(
        "the same with a rate that does harm", both, {**WHOLE, "steps": 120, "lr": 3e-3}
    ),
    "stranger": Tune(
        "the same with a rate that leaves little of the base",
        both,
        {**WHOLE, "steps": 120, "lr": 1e-2},
    ),
}
ARMS = ("patch", "patch+25", "patch+50", "nothing 25", "nothing 100")
Row = dict[str, Any]


def recipe(name: str, **train: Any) -> Recipe:
    """A recipe for a conversion to flow, from fewer dreams, not validated."""
    from recast.recipe import load, override

    return override(
        load(name), objective="flow", train=train, data={"pictures": 64},
        watch={"validate_every": 0},
    )  # fmt: skip


def base_patch() -> Path:
    """Convert pocket-xl once; its patch."""
    from recast import pocket
    from recast.convert import Job
    from recast.recipe import load, override

    how = override(load(), objective="flow", data={"pictures": 64})
    follow(Job(pocket.path("pocket-xl"), RUNS / "base", how, measure=False))
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
    # what a fine-tune does on purpose is what the alarm watches for
    how = override(
        load("train"), train={**tune.train, "checkpoint_every": 1000}, watch={"validate_every": 0}
    )
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
    """The conversion that an arm's name says; its pictures are made here, so no report."""
    from recast.convert import Job

    kind, _, steps = arm.replace("+", " ").partition(" ")
    name, start = ("polish", patch) if kind == "patch" else ("default", None)
    how = recipe(name, steps=int(steps)) if steps else recipe(name)
    return Job(model, out, how, start=start, trains=bool(steps), far=True, measure=False)


def run_arm(name: str, model: Path, patch: Path, arm: str) -> Row:
    """Convert a fine-tune one way, or find it converted; how near its pictures are."""
    folder = RUNS / name / arm.replace(" ", "-")
    share_pairs(RUNS / name, folder, arm)
    follow(arm_job(model, patch, folder, arm))
    return agreement_of(painted(name, "own", model), painted(name, arm, folder / MODEL))


def painted(name: str, kind: str, model: Path, objective: str | None = None) -> list[Tensor]:
    """Pictures of a checkpoint from the bench's prompts and noise, painted once."""
    from recast.checkpoint import Checkpoint, write_dict
    from recast.model import open_model
    from recast.objective import OBJECTIVES
    from recast.pocket.world import caption, scenes
    from recast.sample import sample_images

    file = RUNS / name / f"{kind.replace(' ', '-')}.pictures.safetensors"
    if not file.exists():
        chance = random.Random(1)
        chosen = [chance.sample(scenes(held=held), PICTURES // 2) for held in (False, True)]
        prompts = [caption(scene) for both in zip(*chosen, strict=True) for scene in both]
        made = sample_images(
            open_model(model), prompts, seeds=range(1000, 1000 + PICTURES), steps=25, scale=3.0,
            batch=8, as_objective=OBJECTIVES[objective] if objective else None,
        )  # fmt: skip
        write_dict(file, {f"{k:03d}": picture.image for k, picture in enumerate(made)})
    with Checkpoint(file) as stored:
        return [stored[key] for key in sorted(stored)]


def agreement_of(one: list[Tensor], other: list[Tensor]) -> Row:
    """Mean PSNR of pairs of pictures, and its standard error."""
    from recast.evaluate.agreement import agreement

    found = agreement(one, other)
    return {"psnr": found.mean, "error": found.spread / len(one) ** 0.5}


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
        found = {"base": row["base"], **row["arms"], "ceiling": row["ceiling"]}
        figures = [
            f"{found[arm]['psnr']:.1f} dB" if arm in found else "–"
            for arm in ("base", *ARMS, "ceiling")
        ]
        distances = [f"{row[key]:.3f}" for key in ("unet", "patched")]
        lines.append(f"| {' | '.join([name, *distances, *figures])} |")
    return "\n".join([*lines, ""])


def rows_of(names: list[str]) -> Iterator[tuple[str, Row]]:
    """Every fine-tune's figures, as they come."""
    from recast import pocket

    patch = base_patch()
    base = pocket.path("pocket-xl")
    for name in names:
        model = tuned(name)
        own = painted(name, "own", model)
        row: Row = {
            "about": TUNES[name].about,
            **apart(model, patch),
            "base": agreement_of(own, painted("base", "own", base)),
            "ceiling": agreement_of(own, painted(name, "ceiling", model, "flow")),
            "arms": {},
        }
        for arm in ARMS:
            row["arms"][arm] = run_arm(name, model, patch, arm)
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
        rows = {key: rows[key] for key in TUNES if key in rows}
        about = {"torch": torch.__version__, "threads": 1, "device": "cpu"}
        path.write_text(json.dumps({"about": about, "tunes": rows}, indent=2) + "\n")
        (RESULTS / "patch.md").write_text(page(rows))
    (RESULTS / "patch.md").write_text(page(rows))
    print(page(rows))


if __name__ == "__main__":
    main()
