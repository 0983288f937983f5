"""What a conversion of bench/convert kept: fidelity, concepts, watermarks, drift."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _arms import FAMILIES, Arm

if TYPE_CHECKING:
    from torch import Tensor

    from recast.convert import Job

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "runs" / "bench-convert"
ABSENT = ("star", "ring", "moon")
DRIFTING = 16  # latents that the drift is measured on
Row = dict[str, Any]


def user_images() -> Path:
    """The user's folder of images, painted once."""
    from recast.commit import lock
    from recast.pocket.world import SHAPES, scenes, write_folder

    folder = RUNS / "images"
    with lock(RUNS):
        if not (RUNS / "images.complete").exists():
            absent = {SHAPES.index(name) for name in ABSENT}
            seen = [scene for scene in scenes(held=False) if scene.shape not in absent]
            write_folder(folder, random.Random(0).sample(seen, 350), seed=0, marked_share=1 / 3)
            (RUNS / "images.complete").touch()
    return folder


def figures(job: Job, arm: Arm, against: Path) -> Row:
    """Fidelity to the model `against`, concepts kept, watermarks, and drift."""
    from recast import pocket
    from recast.checkpoint import Checkpoint
    from recast.convert import bridge
    from recast.convert.folder import Folder, digest_of, read_identity
    from recast.convert.material import examples_of
    from recast.convert.measure import choose, paint
    from recast.evaluate.agreement import agreement
    from recast.evaluate.concepts import concepts, scenes
    from recast.model import open_model

    captions = [e.caption for e in examples_of(user_images(), skip_broken=False)]
    with Checkpoint(pocket.path("pocket-xl")) as shipped:
        test = choose(job, shipped, captions)
    written = open_model(job.out / "model.safetensors")
    over = bridge.read(Folder(job.out, digest_of(read_identity(job.out) or {})))
    painter = bridge.painter(written, over)
    made = [picture.image for picture in paint(painter, job, test, None)]
    old = original(against, job, None)
    worlds = scenes(test.prompts)
    assert worlds is not None, "the prompts are captions of the pocket world"
    here, there = concepts(made, worlds, test.seen), concepts(old, worlds, test.seen)
    ceiling = original(against, job, None if arm.objective == "same" else arm.objective)
    found = {
        "psnr": agreement(old, made).mean,
        "psnr_wrapper": agreement(ceiling, made).mean,
        "ceiling": agreement(old, ceiling).mean,
    }
    for key in ("alignment", "retention", "leakage"):
        found |= {key: getattr(here, key), f"{key}_original": getattr(there, key)}
    if arm.model in FAMILIES.values() and arm.objective == "flow" and not arm.vae:
        found |= drifts(job, test.prompts[:DRIFTING])
    return {key: round(value, 4) for key, value in found.items()}


def drifts(job: Job, prompts: Sequence[str]) -> Row:
    """Drift at the model's own size and at twice the side, over the power of its answers."""
    from recast.convert.measure import self_made
    from recast.evaluate.drift import drift
    from recast.model import open_model
    from recast.objective import OBJECTIVES, express

    old, new = open_model(job.model), open_model(job.out / "model.safetensors")
    source, target = old.objective, OBJECTIVES["flow"]
    found = {}
    for times in (1, 2):
        theirs, mine = (replace(each, size=times * each.size) for each in (old, new))
        condition = theirs.condition(prompts)
        made = self_made(theirs, prompts, range(len(prompts)), 25)
        nets = {"drift": mine.net, "power": lambda bound: lambda x, t: 0 * x}
        seen = {
            name: drift(
                net, lambda bound, it=theirs: express(it.net(bound), source, target), target,
                [made], [condition], source=source,
            ).against_original
            for name, net in nets.items()
        }  # fmt: skip
        assert seen["drift"] is not None
        assert seen["power"]
        found[f"drift_{times}x"] = seen["drift"] / seen["power"]
    return found


def original(file: Path, job: Job, objective: str | None) -> list[Tensor]:
    """Pictures of the original, by its own sampler or as another objective; painted once."""
    import torch

    from recast import pocket
    from recast.checkpoint import Checkpoint, write_dict
    from recast.convert.material import examples_of
    from recast.convert.measure import choose, paint
    from recast.model import open_model
    from recast.objective import OBJECTIVES

    with Checkpoint(file) as checkpoint:
        path = RUNS / "originals" / f"{checkpoint.sha256()[:16]}-{objective}.safetensors"
    if not path.exists():
        captions = [e.caption for e in examples_of(user_images(), skip_broken=False)]
        with Checkpoint(pocket.path("pocket-xl")) as shipped:
            test = choose(job, shipped, captions)
        wanted = OBJECTIVES[objective] if objective else None
        pictures = [p.image for p in paint(open_model(file), job, test, wanted)]
        write_dict(path, {"pictures": torch.stack(pictures)}, {}, force=True)
    with Checkpoint(path) as checkpoint:
        return list(checkpoint["pictures"])
