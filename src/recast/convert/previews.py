"""Previews: the network as it is now, under the sampler of what it is to become.

From the noise of the original's pictures, so that a glance at two rows tells how far it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recast.commit import commit
from recast.convert.fixed import Originals, batch_of
from recast.evaluate.agreement import agreement
from recast.evaluate.bound import latents, noises, pictures
from recast.evaluate.concepts import concepts, scenes
from recast.evaluate.likeness import likeness
from recast.evaluate.pictures import sheet, shots
from recast.recipe import Recipe

if TYPE_CHECKING:
    from recast.model import Model
    from recast.objective import Objective


def paint(model: Model, objective: Objective, recipe: Recipe, originals: Originals) -> list[Tensor]:
    """The previews, (3, H, W) each, in the originals' order."""
    side = originals.images.shape[-2:]
    eps = noises(model.latent_shape((side[0], side[1])), originals.seeds).to(model.device)
    x = latents(
        lambda bound: model.net(bound, objective), objective, eps, originals.condition,
        originals.negative, steps=recipe.watch.preview_steps, scale=recipe.evaluate.guidance,
        solver=recipe.evaluate.solver, batch=batch_of(eps),
    )  # fmt: skip
    return pictures(model.decode, x)


def write_sheet(root: Path, step: int, originals: Originals, made: Sequence[Tensor]) -> Path:
    """Write `previews/step00000100.png`: the original's pictures above the run's."""
    rows = shots(originals.prompts, originals.seeds, list(originals.images), made)
    data = sheet(rows, ("original", f"step {step}"))
    path = root / "previews" / f"step{step:08d}.png"
    path.parent.mkdir(exist_ok=True)
    commit(path, lambda file: file.write(data), size=len(data), force=True)
    return path


def judged(
    recipe: Recipe, originals: Originals, made: Sequence[Tensor], device: str
) -> dict[str, float]:
    """Figures of previews: agreement, then the judge's where there is one, else the statistics'.

    psnr in dB; alignment, retention and watermark as the report has them, from a few pictures.
    """
    before = list(originals.images)
    found = {"psnr": agreement(before, made).mean}
    worlds = scenes(originals.prompts)
    if worlds is not None:
        seen = concepts(made, worlds, originals.seen)
        shares = {"alignment": seen.alignment, "retention": seen.retention}
        found |= {name: share for name, share in shares.items() if share is not None}
        found["watermark"] = seen.leakage
    else:
        found |= {
            name: value for name, value in likeness(before, made).items() if value is not None
        }
    for folder in recipe.evaluate.judges:
        found |= clip_score(folder, device, made, originals.prompts)
    return {name: float(f"{value:.6g}") for name, value in found.items()}


def clip_score(
    folder: str, device: str, made: Sequence[Tensor], prompts: Sequence[str]
) -> dict[str, float]:
    """The CLIP score, where the folder holds a CLIP; a Fréchet distance of a few says nothing."""
    from recast.evaluate.judges import Clip, judge_kind, open_judge

    if judge_kind(Path(folder)) != "clip":
        return {}
    judge = open_judge(Path(folder), device)
    assert isinstance(judge, Clip)
    with torch.no_grad():
        return {"CLIP score": judge.score(made, prompts)}
