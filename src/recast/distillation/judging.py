"""What a student paints beside its teacher, from the same noise; judged where there is a judge.

teacher   the original, its own sampler        student   the written file, its own sampler
wrong     the written file sampled as what it no longer is: proof of the conversion
"""

from __future__ import annotations

import json
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from recast.distillation.config import Config
from recast.distillation.folder import LOG, MODEL
from recast.evaluate.agreement import agreement
from recast.evaluate.concepts import concepts, scenes
from recast.evaluate.likeness import likeness
from recast.events import Event, Stage, Tick
from recast.sample.images import sample_images

if TYPE_CHECKING:
    from torch import Tensor

    from recast.checkpoint import Checkpoint
    from recast.model import Model

WRONG = 16  # pictures by the wrong sampler
LAST = 0.1  # share of the steps whose means are told


def judged(model: Model, config: Config, out: Path) -> Generator[Event, None, dict[str, Any]]:
    """Paint with both and compare; returns figures, empty where no picture is asked for."""
    from recast.model import open_model

    how = config.evaluate
    if not how.pictures:
        return {}
    prompts = prompts_of(model.checkpoint, config)
    seeds = [how.seed + k for k in range(len(prompts))]
    student = open_model(out / MODEL, dtype=model.dtype, device=model.device, parts=("unet",))
    borrowed = replace(model, parts={**dict(model.parts), "unet": student.unet})
    as_student = replace(borrowed, objective=student.objective)
    few = min(WRONG, len(prompts))
    yield Stage("paint and compare", 2 * len(prompts) + few, "pictures")
    made: dict[str, list[Tensor]] = {}
    done = 0
    for name, painter, count in (
        ("teacher", model, len(prompts)),
        ("student", as_student, len(prompts)),
        ("wrong", borrowed, few),
    ):
        made[name] = []
        for picture in sample_images(
            painter, prompts[:count], seeds=seeds[:count], steps=how.steps, scale=how.guidance,
            batch=how.batch,
        ):  # fmt: skip
            made[name].append(picture.image)
            done += 1
            yield Tick(done)
    return figures(prompts, made)


def figures(prompts: list[str], made: dict[str, list[Tensor]]) -> dict[str, Any]:
    """What pictures of teacher, student and the wrong sampler come to."""
    found: dict[str, Any] = {
        "pictures": len(prompts),
        "psnr_same_noise_db": agreement(made["teacher"], made["student"]).mean,
        "likeness": likeness(made["teacher"], made["student"]),
    }
    worlds = scenes(prompts)
    if worlds is not None:
        for name, group in made.items():
            some = worlds[: len(group)]
            found[f"alignment_{name}"] = concepts(group, some, [True] * len(some)).alignment
        if found["alignment_teacher"]:
            found["alignment_share"] = found["alignment_student"] / found["alignment_teacher"]
    return found


def prompts_of(checkpoint: Checkpoint, config: Config) -> list[str]:
    """Prompts to paint: other ones than were dreamt of, where there are others."""
    from recast.wishes import in_pocket, pocket_world, prompts_for

    count, seed = config.evaluate.pictures, config.evaluate.seed
    pool = list(pocket_world() if in_pocket(checkpoint) else prompts_for(None, checkpoint))
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed)).tolist()
    return [pool[k] for k in order[:count]]


def summary(out: Path) -> dict[str, Any]:
    """Means over the last tenth of the logged steps; the first step's losses beside them."""
    rows = [json.loads(line) for line in (out / LOG).read_text(encoding="utf-8").splitlines()]
    last = rows[-max(1, round(LAST * len(rows))) :]

    def mean(name: str) -> float | None:
        known = [row[name] for row in last if row[name] is not None]
        return sum(known) / len(known) if known else None

    gradients = [row["gradient_ratio"] for row in rows if row["gradient_ratio"] is not None]
    return {
        "steps": rows[-1]["step"],
        **{name: mean(name) for name in ("flow", "blocks", "R", "saturated", "seconds")},
        "block_share_of_loss": share(last),
        "gradient_ratio": sum(gradients) / len(gradients) if gradients else None,
        "lambda": rows[-1]["lambda"],
        "bins": [column(last, k) for k in range(len(rows[-1]["bins"]))],
        "flow_first": rows[0]["flow"],
        "saturated_most": max(row["saturated"] for row in rows),
    }


def share(rows: list[dict[str, Any]]) -> float | None:
    """The block term's share of the whole loss."""
    total = sum(row["loss"] for row in rows)
    return sum(row["block_weight"] * row["blocks"] for row in rows) / total if total else None


def column(rows: list[dict[str, Any]], k: int) -> float | None:
    known = [row["bins"][k] for row in rows if row["bins"][k] is not None]
    return sum(known) / len(known) if known else None
