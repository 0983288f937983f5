"""Text encoders that are trained: prompts are encoded in the step, by the encoders as they are.

The cache's conditions are the original's, so a draw carries its captions beside them, and the
network encodes those itself. What is left of the cache is the picture's size, and which rows are
zeros instead of a caption.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from recast.convert.networks import trains_text
from recast.convert.sources import sources_of
from recast.errors import Refused
from recast.layout import Layout
from recast.text.encode import Condition

if TYPE_CHECKING:
    from recast.convert import Job
    from recast.model import Model


@dataclass(frozen=True)
class Told:
    """Captions (B), and the original's condition of them, from the cache."""

    captions: tuple[str, ...]
    cached: Condition


def check(layout: Layout, job: Job) -> None:
    """Refuse to train text encoders without the captions of images."""
    wanted = sources_of(job)
    if not trains_text(layout, job.recipe):
        return
    if job.measure:
        raise Refused(
            f"train.profile {job.recipe.train.profile!r} names text encoders, and a conversion's "
            "report is about the UNet alone: leave them out, or take recast train."
        )
    if wanted.images is None or wanted.dreams == "dreams":
        raise Refused(
            "text encoders learn from the captions of images: give --images and set data.source "
            "to images, or to mix with replay, or leave them out of train.profile "
            f"{job.recipe.train.profile!r}."
        )
    if job.recipe.target.teacher != "data":
        raise Refused(
            "text encoders learn what images are of: set target.teacher to data, or leave them "
            f"out of train.profile {job.recipe.train.profile!r}."
        )


def current(model: Model, condition: Condition | Told) -> Condition:
    """The condition as the model's text encoders have it now; what is no text stays."""
    if isinstance(condition, Condition):
        return condition
    return encoded(model, condition.captions, condition.cached)


@torch.no_grad()
def now(model: Model, captions: Sequence[str], cached: Condition) -> Condition:
    """Captions as the text encoders read them now, for looking only; on the CPU."""
    return encoded(model, captions, cached).to("cpu")


def encoded(model: Model, captions: Sequence[str], cached: Condition) -> Condition:
    """Captions encoded anew, at the sizes of their cached conditions; zeros stay zeros."""
    found = replace(model.condition(captions), time_ids=cached.time_ids)
    zeroed = ~cached.context.flatten(1).any(1)
    if not zeroed.any():
        return found
    return found.zeros().where(zeroed.to(found.context.device), found)
