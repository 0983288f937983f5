"""What training draws from: the user's images in latent space, or the original's own dreams.

Both hand out draws as a pure function of (seed, step), so a resumed run goes on without a trace.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import torch

from recast.checkpoint import Checkpoint
from recast.convert import exchange
from recast.convert.bridge import Bridge, crossed
from recast.convert.folder import Folder, Stopped
from recast.convert.noising import dealt, draw, remarks
from recast.convert.replay import ZERO, Replay
from recast.convert.selfmade import Selfmade, finished
from recast.data.buckets import Buckets, aspects, square
from recast.dream import Plan, dream, prompts_for, read_shards
from recast.events import Event, Note, Stage, Tick
from recast.objective import Objective
from recast.recipe import Recipe
from recast.train import Aware, Draw

if TYPE_CHECKING:
    from recast.convert import Job
    from recast.data.cache import Dataset
    from recast.data.folder import Example
    from recast.model import Model
    from recast.text.encode import Condition

BUCKETED = 256  # pixels of a side from which pictures keep their aspect
CONDITIONS_AT_ONCE = 32  # prompts that the text encoders take together


class Material(Protocol):
    """A source of draws; `draws(done)` begins with the first one that step `done` needs."""

    def draws(self, done: int, aware: Aware | None = None) -> Iterator[Draw]: ...

    def null(self) -> Condition:
        """The condition without a prompt, one row."""

    @property
    def bridge(self) -> Bridge | None:
        """The way from the original's latent space, where these are of another VAE."""


@dataclass(frozen=True)
class Images:
    """Latents and captions of a folder of images, noised along the new path."""

    dataset: Dataset
    recipe: Recipe
    objective: Objective
    bridge: Bridge | None = None

    def draws(self, done: int, aware: Aware | None = None) -> Iterator[Draw]:
        how, data = self.recipe.train, self.recipe.data
        for step in range(done, how.limit):
            for micro, (t, weight) in enumerate(dealt(self.recipe, step, aware)):
                number = step * how.accumulate + micro
                batch = self.dataset.batch(
                    number, how.seed, how.batch, dropout=data.caption_dropout, null=data.null,
                    zero_share=data.zero_share,
                )  # fmt: skip
                yield draw(
                    self.recipe, self.objective, number, batch.x0, t, weight, batch.condition,
                    batch.index, self.dataset.store.model.factor,
                )  # fmt: skip

    def null(self) -> Condition:
        from recast.text.encode import Condition

        found, _ = self.dataset.store.text("")
        pooled = found.get("pooled")
        empty = Condition(found["context"][None], None if pooled is None else pooled[None])
        return empty.zeros() if self.recipe.data.null == "zero" else empty


def gather(
    checkpoint: Checkpoint,
    folder: Folder,
    job: Job,
    source: str,
    objective: Objective,
    stopped: Callable[[], int],
) -> Generator[Event, None, Material]:
    """Make the material, or find it made; returns it."""
    if (images := images_of(job)) is not None:
        return (yield from from_images(checkpoint, images, folder, job, source, objective, stopped))
    return (yield from from_dreams(checkpoint, folder, job, source, objective, stopped))


def from_images(
    checkpoint: Checkpoint,
    images: Path,
    folder: Folder,
    job: Job,
    source: str,
    objective: Objective,
    stopped: Callable[[], int],
) -> Generator[Event, None, Images]:
    """Encode a folder's images and captions into the run's cache; returns Images."""
    from recast.convert import fixed
    from recast.data.cache import Dataset, Store, prepare
    from recast.data.folder import scan
    from recast.model import open_model

    for remark in remarks(job.recipe):
        yield Note(remark)
    on_broken: Literal["refuse", "skip"] = "skip" if skips_broken(job) else "refuse"
    found = scan(images, on_broken=on_broken)
    for problem in found.problems:
        yield Note(f"left out: {problem.what}")
    model = open_model(job.model, device=job.device, objective=source)
    if job.recipe.data.size:
        model = replace(model, size=job.recipe.data.size)
    student = exchange.into(model, checkpoint, job.recipe)
    store = Store(folder.path("cache"), student)
    store.text("")
    yield Stage("encode images", len(found.examples), "images")
    made = []
    for entry in prepare(found, store, buckets=buckets(model.size), on_broken=on_broken):
        made.append(entry)
        if entry.problem:
            yield Note(f"left out: {entry.problem}")
        yield Tick(len(made))
        if signal := stopped():
            raise Stopped(signal, "stopped while encoding images; the same command goes on there.")
    taught, held = fixed.hold_out(made, job.recipe)
    dataset = Dataset.of(store, taught)
    bridge = yield from exchange.bridge_of_images(model, student, dataset, folder, job.recipe)
    fixed.prepare(model, student, folder, job, objective, bridge, fixed.known(dataset, held))
    # From here on every entry is read: the encoders can leave the device's memory.
    slim = replace(student, parts={})
    dataset = replace(dataset, store=replace(store, model=slim))
    return Images(dataset, job.recipe, objective, bridge)


def buckets(side: int) -> Buckets:
    """Aspect buckets of a model's size; small models know one square only."""
    return aspects(side) if side >= BUCKETED else square(side)


def from_dreams(
    checkpoint: Checkpoint,
    folder: Folder,
    job: Job,
    source: str,
    objective: Objective,
    stopped: Callable[[], int],
) -> Generator[Event, None, Material]:
    """Let the original dream into the run's `pairs`; returns Replay, or Selfmade for another VAE.

    Replayed states are of the original's own latent space, so another VAE takes pictures instead.
    """
    from recast.convert import fixed
    from recast.model import open_model
    from recast.text.encode import cat

    plan = dream_plan(job, checkpoint, objective.name)
    model = open_model(job.model, device=job.device, objective=source)
    yield from dream(model, folder.path("pairs"), plan, stopped=stopped)
    if signal := stopped():
        raise Stopped(signal, "stopped while dreaming; the same command goes on there.")
    shards = tuple(read_shards(folder.path("pairs"), plan, checkpoint.sha256()))
    prompts = [*dict.fromkeys(text for shard in shards for text in shard.prompts if text), ""]
    conditions = encoded(model, prompts, plan.size)
    student = exchange.into(model, checkpoint, job.recipe)
    made, x0, bridge = finished(shards, plan), None, None
    if student is not model:
        x0 = crossed(model, student, made.x0.to(model.device)).cpu()
        bridge = yield from exchange.bridge_of(made.x0, x0, folder, job.recipe)
    fixed.prepare(model, student, folder, job, objective, bridge)
    conditions = cat([conditions[:-1], conditions[-1].zeros(), conditions[-1]])
    rows = {prompt: row for row, prompt in enumerate([*prompts[:-1], ZERO, ""])}
    if x0 is not None:
        row = torch.tensor([rows[prompt] for prompt in made.prompts])
        return Selfmade(
            x0, row, made.zeroed, conditions, job.recipe, objective, job.device, model.factor,
            bridge,
        )  # fmt: skip
    return Replay(shards, conditions, rows, job.recipe, objective, job.device, model.factor)


def encoded(model: Model, prompts: list[str], size: int | None) -> Condition:
    """Conditions of prompts, on the CPU, encoded in small groups."""
    from recast.text.encode import cat

    groups = range(0, len(prompts), CONDITIONS_AT_ONCE)
    with torch.no_grad():
        found = [
            model.condition(prompts[k : k + CONDITIONS_AT_ONCE], size=size).to("cpu")
            for k in groups
        ]
    return cat(found)


def dream_plan(job: Job, checkpoint: Checkpoint, objective: str) -> Plan:
    """What the recipe asks the original to dream of."""
    data = job.recipe.data
    return Plan(
        prompts=prompts_for(Path(data.prompts) if data.prompts else None, checkpoint),
        pictures=data.pictures,
        steps=data.replay_steps,
        guidance=data.guidance,
        jitter=data.jitter,
        seed=job.recipe.train.seed,
        size=data.size or None,
        objective=objective,
        null=data.null,
        zero_share=data.zero_share,
    )


def images_of(job: Job) -> Path | None:
    """The folder of images that the command line or the recipe names."""
    return job.images or (Path(job.recipe.data.images) if job.recipe.data.images else None)


def skips_broken(job: Job) -> bool:
    """Whether the command line or the recipe says to leave broken images out."""
    return job.skip_broken or job.recipe.data.skip_broken


def examples_of(images: Path, *, skip_broken: bool) -> tuple[Example, ...]:
    """The images of a folder by name; raises Refused for an empty one, naming broken ones."""
    from recast.data.folder import scan

    return scan(images, on_broken="skip" if skip_broken else "refuse").examples


def images_digest(examples: tuple[Example, ...]) -> str:
    """Hash of every image and caption that will be trained on."""
    from recast.data.cache import hash_file

    found = hashlib.sha256()
    for example in examples:
        line = f"{example.name}\0{example.repeats}\0{example.caption}\0{hash_file(example.path)}\n"
        found.update(line.encode())
    return found.hexdigest()[:16]


def training_captions(job: Job, checkpoint: Checkpoint, folder: Folder) -> tuple[str, ...]:
    """What the training was told: the images' captions, or the prompts that were dreamt."""
    if (images := images_of(job)) is not None:
        found = examples_of(images, skip_broken=skips_broken(job))
        return tuple(example.caption for example in found)
    return tuple(dream_plan(job, checkpoint, "flow").order())
