"""What can be refused before a run writes anything: the file, the recipe, the images, the room.

A refusal leaves the disk as it was, so whatever is cheap to know is asked here, and whatever would
end hours of work with a usage error too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from recast.adapter import refuse_residual
from recast.checkpoint import Checkpoint
from recast.commit import require_room, standing
from recast.convert import groups, networks, sources
from recast.convert.folder import Folder, digest_of
from recast.errors import Refused
from recast.events import Event, Stage, Tick
from recast.layout import Layout, detect
from recast.markers import read_objective
from recast.objective import OBJECTIVES
from recast.quantise import check_base
from recast.recipe import Recipe

if TYPE_CHECKING:
    from recast.convert import Job
    from recast.data.folder import Example

PARTS = ("unet", "te1", "te2", "vae")
STATES = 3  # two that are kept and the one being written


def objectives(checkpoint: Checkpoint, job: Job) -> tuple[str, str]:
    """(what the model predicts, what it shall predict).

    Raises Refused where the file contradicts itself, and where there is nothing to convert.
    """
    evidence = read_objective(checkpoint.specs, checkpoint.metadata)
    if job.source is not None and job.source not in OBJECTIVES:
        raise Refused(
            f"no objective {job.source!r}: --source takes one of {', '.join(OBJECTIVES)}."
        )
    if job.source is None and (evidence.contradictions or evidence.objective is None):
        reasons = "; ".join(evidence.contradictions or evidence.reasons)
        raise Refused(
            f"{checkpoint.path} does not say what it predicts ({reasons}): give --source."
        )
    source = job.source or str(evidence.objective)
    wanted = job.recipe.target.objective
    objective = source if wanted == "same" else wanted
    if job.measure and objective == source and wanted != "same" and not job.recipe.data.vae:
        raise Refused(f"{checkpoint.path} predicts {source} already: there is nothing to convert.")
    return source, objective


def check_model(checkpoint: Checkpoint, recipe: Recipe) -> Layout:
    """The layout of a whole checkpoint that the recipe can work on.

    Raises Refused for adapters, residuals, unknown architectures, and missing or unfit parts.
    """
    from recast.model.load import preferred_size, wanted

    layout = detect(checkpoint)
    refuse_residual(checkpoint)
    wanted(checkpoint, layout, PARTS)
    preferred_size(checkpoint, layout)
    groups.check(layout, recipe)
    networks.check(layout, recipe)
    return layout


def check_recipe(job: Job, checkpoint: Checkpoint) -> None:
    """Refuse what a recipe's own check cannot see: solver, optimizer arguments, prompts, sizes."""
    import torch

    from recast.convert import budget, prompted, running
    from recast.convert.fixed import previews, validates
    from recast.convert.sources import dream_plan, sources_of
    from recast.evaluate.judges import judge_kind
    from recast.optim import build
    from recast.sample.solvers import find_solver
    from recast.wishes import prompts_for

    recipe = job.recipe
    sources.check(job)
    wanted = sources_of(job)
    check_draws(recipe, replays=wanted.images is None and wanted.dreams == "replay")
    find_solver(recipe.evaluate.solver)
    find_solver(recipe.data.replay_solver)
    find_solver(recipe.watch.preview_solver or recipe.evaluate.solver)
    prompted.check(recipe)
    check_base(recipe.train.base, job.device)
    running.check(recipe, job.device)
    budget.check(recipe, images=wanted.images is not None)
    one = torch.zeros(1, device=job.device, requires_grad=True)
    build(recipe.train.optimizer, [one], lr=recipe.train.lr, **recipe.train.optimizer_args)
    for folder in recipe.evaluate.judges:
        judge_kind(Path(folder))
    if recipe.train.steps == "auto" and not validates(recipe):
        raise Refused(
            "train.steps is auto, which decides by validations: give a watch.validate_every of 1 "
            "to train.max_steps."
        )
    for key in ("size", "dream_size"):
        if (side := getattr(recipe.data, key)) % 8:
            raise Refused(f"data.{key} is {side}: give a multiple of 8, or 0.")
    if wanted.dreams:
        dream_plan(job, checkpoint, recipe.target.objective)
    asks = job.measure or validates(recipe) or previews(recipe)
    if asks and recipe.evaluate.prompts:
        prompts_for(Path(recipe.evaluate.prompts), checkpoint)


def check_draws(recipe: Recipe, *, replays: bool) -> None:
    """Refuse keys of times, noise and targets that would do nothing, or undo one another.

    `replays`: nothing but replayed states is trained on.
    """
    how, noise = recipe.train, recipe.noise
    if how.times == "loss-aware" and (how.shift != 1 or how.shift_side):
        raise Refused(
            "loss-aware times find their own place: set train.shift to 1, shift_side to 0."
        )
    if how.times == "loss-aware" and how.weighting == "edm2":
        raise Refused(
            "train.weighting edm2 makes the loss alike everywhere, which leaves loss-aware times "
            "nothing to go by: choose one of the two."
        )
    if recipe.target.guided != 1 and recipe.target.teacher == "data":
        raise Refused("target.guided is about the original's answers, which teacher data ignores.")
    if replays and (
        noise.multires or noise.offset or noise.perturbation or noise.pairing != "none"
    ):
        raise Refused(
            "replayed states bring their own noise: give --images, set data.source to dreams, or "
            "leave the recipe's section noise out."
        )


def check_out(out: Path) -> None:
    """Refuse a run folder that is a file, or in a place where nothing can be written."""
    found = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not found.is_dir():
        raise Refused(f"--out {out}: {found} is a file, not a folder; name another place.")
    if not os.access(found, os.W_OK | os.X_OK):
        raise Refused(
            f"--out {out}: {found} cannot be written to; name another place or "
            "change its permissions."
        )


def check_way(job: Job, source: str, objective: str) -> None:
    """Refuse objectives on the way that do not exist or that a leg would end where it began."""
    if not job.via:
        return
    if odd := [name for name in job.via if name not in OBJECTIVES]:
        raise Refused(f"no objective {odd[0]!r}: --via takes one of {', '.join(OBJECTIVES)}.")
    if job.start is not None:
        raise Refused("a patch makes the whole way at once: leave --via or --from out.")
    way = [source, *job.via, objective]
    if twice := [one for one, other in pairwise(way) if one == other]:
        raise Refused(
            f"the way {' → '.join(way)} has {twice[0]} twice in a row: leave one of them out."
        )


def check_file(job: Job, identity: Mapping[str, object]) -> None:
    """Refuse to replace a model file outside the run folder that is not this run's."""
    if job.file is None or job.force or not job.file.exists():
        return
    digest = digest_of(identity)
    if not Folder(job.out, digest, {"model.safetensors": job.file}).has("model.safetensors"):
        raise Refused(
            f"{job.file} exists and is no file of this run: give another --out, "
            "or --force to replace it."
        )


def check_room(checkpoint: Checkpoint, layout: Layout, job: Job) -> None:
    """Raise NoRoom unless the result, what is trained and its states have room."""
    trained = networks.trained_numbers(layout, job.recipe)
    # fp32 adapter, fp16 patch; a state holds the weights and two moments
    size = checkpoint.nbytes + trained * (4 + 2 + STATES * 3 * 4)
    require_room(standing(job.out), size + sources.room(checkpoint, layout, job))


def check_images(examples: tuple[Example, ...], *, skip_broken: bool) -> Iterator[Event]:
    """Decode every picture once, so that a broken one is named before the run begins.

    Where broken ones are skipped, one that can be read is enough.
    """
    from recast.data.images import load

    yield Stage("check images", len(examples), "images")
    for count, example in enumerate(examples, 1):
        try:
            load(example.path)
        except Refused as error:
            if not skip_broken:
                raise Refused(
                    f"{str(error).rstrip('.')} (mend or remove it, or give --skip-broken)."
                ) from error
            if count == len(examples):
                raise Refused(f"{example.root} has no picture that can be read.") from error
        else:
            if skip_broken:
                yield Tick(len(examples))
                return
        yield Tick(count)
