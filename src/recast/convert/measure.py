"""The measuring stage: the file that was written against the original it came from.

    original   its own sampler                  wrapper  the original, sampled as the new objective
    converted  the new file, the new sampler    wrong    the new file, the old sampler

All from the same noise. The wrapper needs no training: its agreement is the ceiling of the measure.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, zip_longest
from os.path import relpath
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from recast.checkpoint import Checkpoint
from recast.convert import bridge as bridges
from recast.convert import exchange, nulls
from recast.convert.compose import SHOWN, Test, compose, finished, hashes
from recast.convert.fixed import batch_of
from recast.convert.folder import Folder
from recast.convert.material import training_captions
from recast.convert.opening import opened
from recast.convert.sources import sources_of
from recast.evaluate.bound import latents as latents_of
from recast.evaluate.bound import noises
from recast.evaluate.concepts import present, scenes
from recast.evaluate.drift import drift
from recast.evaluate.loading import Howto, how_to_load
from recast.evaluate.report import write_report
from recast.evaluate.values import Drift
from recast.events import Event, Note, Stage, Tick
from recast.model.folder import FOLDER, write_config_folder
from recast.objective import OBJECTIVES, Net, Objective, express
from recast.sample.images import Painter, Picture, sample_images

if TYPE_CHECKING:
    from torch import Tensor

    from recast.convert import Job
    from recast.model import Model
    from recast.text.encode import Condition

FILE = "model.safetensors"
UNJUDGED = 16  # pictures at most where no judge can make use of more


def measure(
    checkpoint: Checkpoint, folder: Folder, job: Job, source: str, objective: str
) -> Iterator[Event]:
    """Write the report unless this run has one already; yields progress."""
    files = hashes(folder)
    if finished(folder, files):
        yield Note("The report is written already.")
        return
    captions = training_captions(job, checkpoint, folder)
    old, new = OBJECTIVES[source], OBJECTIVES[objective]
    test = choose(job, checkpoint, captions)
    total = len(test.prompts)
    yield Stage("paint and compare", 3 * total + min(SHOWN, total), "pictures")
    # one model after the other: each is let go of before the next is opened
    first = yield from the_original(checkpoint, folder, job, test, old, new)
    second = yield from the_converted(folder, job, test, old, new, first)
    report = compose(
        job, folder, test, first.pictures | second.pictures, first.drift, source, objective
    )
    null, null_shots = nulls.joined(first.unprompted, second.unprompted, test)
    report = replace(report, howto=second.howto, hashes=files, null=null, null_shots=null_shots)
    write_report(folder.root, report)


@dataclass(frozen=True)
class Original:
    """What the report needs of the original: its pictures as either objective, drift, nulls."""

    pictures: dict[str, list[Tensor]]
    drift: Drift
    unprompted: nulls.Side


@dataclass(frozen=True)
class Converted:
    """What the report needs of the new file; `howto` says how it is loaded elsewhere."""

    pictures: dict[str, list[Tensor]]
    unprompted: nulls.Side
    howto: tuple[Howto, ...]


def the_original(
    checkpoint: Checkpoint, folder: Folder, job: Job, test: Test, old: Objective, new: Objective
) -> Generator[Event, None, Original]:
    """Open the original, measure and paint."""
    model = opened(checkpoint, job, old.name)
    table = measure_drift(model, folder, job, test, old, new)
    made: dict[str, list[Tensor]] = {"original": [], "wrapper": []}
    ticks = count(1)
    for name, as_objective in (("original", None), ("wrapper", new)):
        for picture in paint(model, job, test, as_objective):
            made[name].append(picture.image)
            yield Tick(next(ticks))
    return Original(made, table, nulls.side(model, job, test))


def the_converted(
    folder: Folder, job: Job, test: Test, old: Objective, new: Objective, first: Original
) -> Generator[Event, None, Converted]:
    """Open the file that was written and paint, with the new sampler and a few with the old one."""
    written, bridge = opened(folder.path(FILE), job, new.name), bridges.read(folder)
    few = replace(test, prompts=test.prompts[:SHOWN], seeds=test.seeds[:SHOWN])
    made: dict[str, list[Tensor]] = {"converted": [], "wrong": []}
    ticks = count(1 + sum(map(len, first.pictures.values())))
    for name, model, asked in (
        ("converted", written, test),
        ("wrong", replace(written, objective=old), few),
    ):
        for picture in paint(bridges.painter(model, bridge), job, asked, None):
            made[name].append(picture.image)
            yield Tick(next(ticks))
    if bridge is not None:
        made["through the VAE"] = bridges.through(written, first.pictures["original"])
    howto = how_to_load(
        written.layout.family, new.name, folder.path(FILE).name,
        config=config_folder(written, folder),
    )  # fmt: skip
    return Converted(made, nulls.side(written, job, test), howto)


def config_folder(model: Model, folder: Folder) -> str | None:
    """Write the folder that diffusers needs for a file of unusual size; its path from the file's.

    None for the usual sizes.
    """
    if model.layout.unet["block_out_channels"][0] == 320:
        return None
    place = folder.path(FOLDER)
    write_config_folder(model.layout, place)
    return Path(relpath(place, folder.path(FILE).parent)).as_posix()


def paint(
    model: Painter, job: Job, test: Test, as_objective: Objective | None
) -> Iterator[Picture]:
    """The test's pictures, with the sampler that fits."""
    how = job.recipe.evaluate
    yield from sample_images(
        model, test.prompts, seeds=test.seeds, steps=how.steps, solver=how.solver,
        scale=how.guidance, batch=how.batch, as_objective=as_objective,
    )  # fmt: skip


def choose(job: Job, checkpoint: Checkpoint, captions: Sequence[str]) -> Test:
    """Prompts to paint: where a judge exists, half with concepts of the training, half without."""
    how = job.recipe.evaluate
    pool = prompt_pool(job, checkpoint)
    generator = torch.Generator().manual_seed(how.seed)

    def some(prompts: Sequence[str], count: int) -> list[str]:
        order = torch.randperm(len(prompts), generator=generator).tolist()
        return [prompts[k] for k in order[:count]]

    if scenes(pool) is None:
        total = min(how.pictures, UNJUDGED)
        own = [*dict.fromkeys(captions)] if sources_of(job).images else []
        chosen = some(own, (total + 1) // 2)
        chosen += some(pool, total - len(chosen))
        seen = [True] * len(chosen)
    else:
        inside, outside = split_pool(pool, captions)
        fresh = some(outside, how.pictures // 2)
        known = some(inside, how.pictures - len(fresh))
        # alternate, so that the first few that the report shows are of both kinds
        both = zip_longest(known, fresh)
        chosen = [prompt for pair in both for prompt in pair if prompt is not None]
        taught = set(known)
        seen = [prompt in taught for prompt in chosen]
    seeds = tuple(how.seed + k for k in range(len(chosen)))
    return Test(tuple(chosen), seeds, tuple(seen))


def prompt_pool(job: Job, checkpoint: Checkpoint) -> list[str]:
    """The recipe's file of prompts, every caption of the pocket world, or the list that ships."""
    from recast.pocket.world import caption
    from recast.pocket.world import scenes as world
    from recast.wishes import prompts_for

    file = job.recipe.evaluate.prompts
    if not file and checkpoint.metadata.get("recast.world") == "pocket":
        return [caption(scene) for scene in world()]
    return list(prompts_for(Path(file) if file else None, checkpoint))


def split_pool(pool: Sequence[str], captions: Sequence[str]) -> tuple[list[str], list[str]]:
    """Prompts whose concepts the training had, and those it had not.

    Absent is a word that no caption has; where captions have every word, a combination that the
    pocket checkpoints never saw either.
    """
    from recast.pocket.world import is_held, parse

    taught = [prompt for prompt in pool if not is_held(parse(prompt))]
    flags = present(taught, captions)
    absent = [prompt for prompt, flag in zip(taught, flags, strict=True) if not flag]
    inside = [prompt for prompt, flag in zip(taught, flags, strict=True) if flag]
    return inside, absent or [prompt for prompt in pool if is_held(parse(prompt))]


def measure_drift(
    model: Model, folder: Folder, job: Job, test: Test, old: Objective, new: Objective
) -> Drift:
    """Drift of the trained network, original and trained in one, on the original's own latents."""
    from recast.adapter import attach, read_adapter

    trained = read_adapter(folder.path("patch.safetensors"))
    sites = model.layout.sites("every")
    how = job.recipe.evaluate
    prompts, seeds = test.prompts[: how.batch], test.seeds[: how.batch]
    with torch.no_grad():
        condition = model.condition(prompts)
    latents = self_made(model, prompts, seeds, how.steps)
    bridge, student = bridges.read(folder), exchange.into(model, model.checkpoint, job.recipe)
    if bridge is not None:
        latents = bridges.crossed(model, student, latents)
    some = torch.arange(len(latents)).split(batch_of(latents))
    attached = attach({"unet": model.unet}, trained, sites)

    def original(bound: Condition) -> Net:
        net = model.net(bound)

        def answer(x: Tensor, t: Tensor) -> Tensor:
            with attached.teacher():
                return net(x, t)

        return express(bridge.carried(answer, old) if bridge else answer, old, new)

    try:
        return drift(
            lambda bound: model.net(bound, new), original, new, [latents[rows] for rows in some],
            [condition[rows] for rows in some], source=old, bins=how.bins, seed=how.seed,
        )  # fmt: skip
    finally:
        attached.detach()


def self_made(model: Model, prompts: Sequence[str], seeds: Sequence[int], steps: int) -> Tensor:
    """Latents (B, C, h, w) of the original's own pictures: data it certainly knows."""
    with torch.no_grad():
        condition = model.condition(prompts)
    eps = noises(model.latent_shape(None), seeds).to(model.device)
    return latents_of(model.net, model.objective, eps, condition, steps=steps, batch=batch_of(eps))
