"""What a run learns from: a folder of images, what the original dreams, or both.

data.source   images   the user's pictures, noised
              replay   states and answers that the original met while it painted
              dreams   the pictures that it painted, noised
              mix      images, and one of the other two
              auto     replay; a mix with images, if there are any and the original teaches
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from recast.checkpoint import Checkpoint
from recast.convert import pairs
from recast.dream import Plan
from recast.errors import Refused
from recast.wishes import CAPTIONS, GRAMMAR, captions_of, from_grammar, prompts_for

if TYPE_CHECKING:
    from recast.convert import Job
    from recast.layout import Layout
    from recast.recipe import Recipe

Dreamt = Literal["replay", "dreams"]
PIXELS = 8  # that a latent is wide, in every family
ENOUGH = 100  # pictures of an automatic count: more gave nothing (docs/log.md)


@dataclass(frozen=True)
class Sources:
    """The folder whose pictures are trained on, and how dreams are used; None what is not."""

    images: Path | None
    dreams: Dreamt | None


def sources_of(job: Job) -> Sources:
    """What the command line and the recipe make of it.

    Replayed states are of the original's own latent space, so another VAE takes pictures instead.
    """
    data, folder = job.recipe.data, images_of(job)
    kind = data.source
    if kind == "auto" and job.pairs is not None:
        kind = "replay" if folder is None else "mix"
    if kind == "auto":
        kind = "replay" if folder is None else "mix" if mixes(job.recipe) else "images"
    if kind == "images" or (kind == "mix" and data.mix_share == 1):
        return Sources(folder, None)
    how: Dreamt = data.mix_with if kind == "mix" else kind
    return Sources(folder if kind == "mix" else None, "dreams" if data.vae else how)


def mixes(recipe: Recipe) -> bool:
    """Whether replayed states go with what a recipe makes of images.

    They bring noise and the original's answers with them, in its own latent space.
    """
    noise = recipe.noise
    noised = noise.multires or noise.offset or noise.perturbation or noise.pairing != "none"
    return recipe.target.teacher == "teacher" and not noised and not recipe.data.vae


def check(job: Job) -> None:
    """Refuse sources that lack what they need, and images that nothing would be made of."""
    data, folder = job.recipe.data, images_of(job)
    if data.source in ("images", "mix") and folder is None:
        raise Refused(f"data.source is {data.source!r}: give --images, or another source.")
    if data.source == "replay" and data.vae:
        raise Refused(
            "replayed states are of the model's own latent space and data.vae names another: set "
            'data.source to "dreams".'
        )
    dreams = sources_of(job).dreams
    if data.prompts == CAPTIONS and folder is None:
        raise Refused('data.prompts is "captions": give --images, whose captions they are.')
    unused = folder is not None and sources_of(job).images is None
    if unused and data.prompts != CAPTIONS:
        raise Refused(
            f'data.source is {data.source!r}, which leaves the images out: set it to "mix", or '
            'data.prompts to "captions" to dream of what they show.'
        )
    if data.grammar_level and not (dreams and data.prompts == GRAMMAR):
        raise Refused('data.grammar_level is about dreaming with data.prompts = "grammar".')


def dream_plan(job: Job, checkpoint: Checkpoint, objective: str) -> Plan:
    """What the recipe asks the original to dream of, or what the pairs at hand were dreamt of."""
    if job.pairs is not None:
        return pairs.plan_of(job.pairs)
    data = job.recipe.data
    return Plan(
        prompts=wishes(job, checkpoint),
        pictures=pictures_of(job),
        steps=data.replay_steps,
        guidance=data.guidance,
        jitter=data.jitter,
        seed=job.recipe.train.seed,
        size=data.dream_size or data.size or None,
        objective=objective,
        null=data.null,
        zero_share=data.zero_share,
        solver=data.replay_solver,
        last=sources_of(job).dreams == "dreams",
    )


def pictures_of(job: Job) -> int:
    """How many pictures are dreamt; without a number, no more states than the run draws."""
    data, how = job.recipe.data, job.recipe.train
    if data.pictures:
        return data.pictures
    share = 1.0 if sources_of(job).images is None else 1 - data.mix_share
    drawn = how.limit * how.batch * how.accumulate * share
    return max(1, min(ENOUGH, math.ceil(drawn / data.replay_steps)))


def wishes(job: Job, checkpoint: Checkpoint) -> tuple[str, ...]:
    """The prompts to dream of: captions, the grammar's, a file's or the list that ships."""
    data, folder = job.recipe.data, images_of(job)
    if data.prompts == CAPTIONS and folder is not None:
        return captions_of(folder)
    if data.prompts == GRAMMAR:
        seed = job.recipe.train.seed
        return from_grammar(pictures_of(job), checkpoint, seed=seed, level=data.grammar_level)
    return prompts_for(Path(data.prompts) if data.prompts else None, checkpoint)


def room(checkpoint: Checkpoint, layout: Layout, job: Job) -> int:
    """Bytes that the dreams of a run take on disk."""
    from recast.model.load import preferred_size

    if sources_of(job).dreams is None or job.pairs is not None:
        return 0
    plan = dream_plan(job, checkpoint, job.recipe.target.objective)
    side = (plan.size or preferred_size(checkpoint, layout)) // PIXELS
    return plan.pictures * plan.nbytes((layout.unet["in_channels"], side, side))


def images_of(job: Job) -> Path | None:
    """The folder of images that the command line or the recipe names."""
    return job.images or (Path(job.recipe.data.images) if job.recipe.data.images else None)


def skips_broken(job: Job) -> bool:
    """Whether the command line or the recipe says to leave broken images out."""
    return job.skip_broken or job.recipe.data.skip_broken
