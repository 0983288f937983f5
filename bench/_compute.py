"""What a conversion of bench/convert cost: forwards, operations of a step, bytes that it holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from recast.convert import Job

Row = dict[str, Any]


def compute(job: Job) -> Row:
    """Forward-equivalents of the arm: those of its training steps, and of making its pictures."""
    from recast.checkpoint import Checkpoint
    from recast.convert.sources import pictures_of, sources_of
    from recast.layout import detect
    from recast.markers import read_objective
    from recast.model.load import preferred_size

    how, data = job.recipe.train, job.recipe.data
    with Checkpoint(job.model) as checkpoint:
        side = preferred_size(checkpoint, detect(checkpoint))
        source = str(read_objective(checkpoint.specs, checkpoint.metadata).objective)
    given, larger = sources_of(job), (data.dream_size / side) ** 2 if data.dream_size else 1
    one, step, held = operations(job, source, replay=given.images is None)
    if given.images and given.dreams == "replay":
        dearer, cheaper = step, operations(job, source, replay=True)[1]
        step = data.mix_share * dearer + (1 - data.mix_share) * cheaper * larger
    steps = taken(job.out)
    dreamt = pictures_of(job) * data.replay_steps * 2 * larger if given.dreams else 0
    trained = steps * how.batch * how.accumulate * step / one
    return {
        "forwards": round(trained + dreamt), "step": round(step / one, 3), "steps": steps,
        "held_mb": round(held / 1e6, 1),
    }  # fmt: skip


def taken(out: Path) -> int:
    """How many steps the run took, by its log."""
    *_, last = (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return int(json.loads(last)["step"])


def operations(job: Job, source: str, *, replay: bool) -> tuple[float, float, float]:
    """Operations of a sample's forward and of its training step; bytes that a whole step holds."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from recast.adapter import attach
    from recast.adapter.decompose import decompose, zeros_full
    from recast.convert.training import student, target_of
    from recast.convert.trunk import shared
    from recast.model import open_model
    from recast.objective import OBJECTIVES
    from recast.train import criterion, noised, replayed

    model = open_model(job.model, objective=source)
    wanted = job.recipe.target.objective
    objective = OBJECTIVES[source if wanted == "same" else wanted]
    sites = model.layout.sites(job.recipe.train.places)
    rank = job.recipe.train.rank
    start = (
        decompose(model.checkpoint, sites, rank) if rank else zeros_full(model.checkpoint, sites)
    )
    attached = attach({"unet": model.unet}, start, sites)
    condition, half = model.condition([""]), torch.full((1,), 0.5)
    x = torch.randn(1, *model.latent_shape())
    made = replayed if replay else noised
    draw = made(objective, x, half, x, condition, half.long())
    moved = bool(job.recipe.data.vae)
    trunk = None if moved else shared(model.unet, attached, model.objective, objective)
    target = target_of(job.recipe, model, attached, objective, condition, trunk)
    loss = criterion(target, objective)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model.net(condition)(x, half)
    mine = {p.untyped_storage().data_ptr() for p in model.unet.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in mine:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with FlopCounterMode(display=False) as whole, hooks:
        loss(student(model, objective, trunk), draw).weighted.mean().backward()
    trained = sum(p.numel() for p in attached.named().values())
    held = 4 * 4 * trained + job.recipe.train.batch * sum(kept.values())
    attached.detach()
    return float(forward.get_total_flops()), float(whole.get_total_flops()), float(held)
