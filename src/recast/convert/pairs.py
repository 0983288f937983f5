"""Pairs that were dreamt beforehand: a folder of `recast dream` in place of the run's own dreams.

The folder's plan stands in for all that the recipe says of dreaming.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recast.checkpoint import Checkpoint
from recast.dream import PLAN, Plan, shards
from recast.errors import Refused
from recast.layout import detect

if TYPE_CHECKING:
    from recast.convert import Job


def plan_of(folder: Path) -> Plan:
    """What a folder's pictures were dreamt of, and how."""
    return read_plan(folder)[0]


def read_plan(folder: Path) -> tuple[Plan, str, str]:
    """A folder's plan, the sha256 of the model that dreamt, and what that predicts."""
    path = folder / PLAN
    try:
        said: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        model, source = str(said.pop("model")), str(said.pop("source"))
        known = {field.name: said.pop(field.name) for field in fields(Plan)}
        plan = Plan(**{**known, "prompts": tuple(known["prompts"])})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refused(
            f"--pairs {folder} has no {PLAN} that can be read: give a folder of recast dream, or "
            "run that command again, which adds it."
        ) from error
    return plan, model, source


def check(checkpoint: Checkpoint, job: Job, source: str, objective: str) -> None:
    """Refuse pairs of another model, of another way, of another size, or not finished."""
    from recast.convert.sources import sources_of
    from recast.model.load import preferred_size

    if job.pairs is None:
        return
    if job.via:
        raise Refused("--pairs are one model's and --via makes several: give one of the two.")
    if sources_of(job).dreams is None:
        raise Refused(
            f"data.source is {job.recipe.data.source!r} and data.mix_share "
            f"{job.recipe.data.mix_share:g}, which leave --pairs out: change them, or leave it out."
        )
    plan, model, predicts = read_plan(job.pairs)
    if model != checkpoint.sha256():
        raise Refused(
            f"--pairs {job.pairs} were dreamt by another model (sha256 {model[:12]}): let this one "
            "dream with recast dream."
        )
    if (predicts, plan.objective) != (source, objective):
        raise Refused(
            f"--pairs {job.pairs} were dreamt from {predicts} to {plan.objective}, and this run "
            f"goes from {source} to {objective}: dream with --to {objective}."
        )
    side = plan.size or preferred_size(checkpoint, detect(checkpoint))
    wanted = job.recipe.data.dream_size or job.recipe.data.size or side
    if side != wanted:
        raise Refused(
            f"--pairs {job.pairs} are of {side} pixels and the recipe wants {wanted}: set "
            "data.dream_size to theirs."
        )
    if plan.last and sources_of(job).dreams == "replay":
        raise Refused(
            f"--pairs {job.pairs} keep the finished pictures only, no states to replay: set "
            'data.source to "dreams".'
        )
    for _ in shards(job.pairs, plan, model):
        """Each is there, whole and of this plan."""
