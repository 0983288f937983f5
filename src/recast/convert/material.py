"""What training draws from: the user's images in latent space, or the original's own dreams.

Both hand out draws as a pure function of (seed, step), so a resumed run goes on without a trace.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import torch

from recast import processes
from recast.checkpoint import Checkpoint
from recast.commit import require_room
from recast.convert import exchange
from recast.convert.bridge import Bridge, crossed
from recast.convert.folder import Folder
from recast.convert.found import examples_of, found_in
from recast.convert.networks import trains_text
from recast.convert.noising import draw, drawn, remarks
from recast.convert.opening import encode_captions, opened
from recast.convert.replay import ZERO, Replay
from recast.convert.selfmade import Selfmade, finished
from recast.convert.sources import dream_plan, skips_broken, sources_of
from recast.convert.texts import Told
from recast.data.ahead import Ahead
from recast.dream import Shard, dream, read_shards
from recast.errors import Stopped
from recast.events import Event, Note, Stage, Tick, amount
from recast.objective import Objective
from recast.recipe import Recipe
from recast.train import Aware, Draw

if TYPE_CHECKING:
    from torch import Tensor

    from recast.convert import Job
    from recast.data.dataset import Batch, Dataset
    from recast.model import Model
    from recast.text.encode import Condition

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
    """Latents and captions of a folder of images, noised along the new path.

    `reads`: the text encoders are trained, and read the captions themselves. `batches` reads them
    ahead.
    """

    dataset: Dataset
    recipe: Recipe
    objective: Objective
    bridge: Bridge | None = None
    reads: bool = False
    batches: Callable[[int], Batch] | None = None

    def draws(self, done: int, aware: Aware | None = None) -> Iterator[Draw]:
        with Ahead(self.batch) as batches:
            yield from drawn(self.recipe, replace(self, batches=batches).draw, done, aware)

    def batch(self, place: int) -> Batch:
        """Batch `place` of the images: pictures, captions and what stands in for dropped ones."""
        how, data = self.recipe.train, self.recipe.data
        return self.dataset.batch(
            place, how.seed, how.batch,
            dropout=data.caption_dropout, null=data.null, zero_share=data.zero_share,
        )  # fmt: skip

    def draw(self, number: int, t: Tensor, weight: Tensor | None, place: int | None = None) -> Draw:
        """Batch `number` of the run, and `place` of the images where others come in between."""
        batch = (self.batches or self.batch)(number if place is None else place)
        made = draw(
            self.recipe, self.objective, number, batch.x0, t, weight, batch.condition,
            batch.index, self.dataset.store.model.factor,
        )  # fmt: skip
        if self.reads:
            made = replace(made, condition=Told(batch.captions, batch.condition))
        if batch.weight is not None:
            both = batch.weight if made.weight is None else made.weight * batch.weight
            made = replace(made, weight=both)
        return made if batch.mask is None else replace(made, mask=batch.mask)

    def null(self) -> Condition:
        from recast.text.encode import Condition

        found, _ = self.dataset.store.text("")
        pooled = found.get("pooled")
        empty = Condition(found["context"][None], None if pooled is None else pooled[None])
        return empty.zeros() if self.recipe.data.null == "zero" else empty


@dataclass(frozen=True)
class Mixed:
    """Batches of images spread evenly among those of dreams, as the recipe's share has it.

    Batch n is of images where floor((n + 1) share) > floor(n share), whatever came before.
    """

    images: Images
    dreams: Replay | Selfmade
    recipe: Recipe

    @property
    def bridge(self) -> Bridge | None:
        return self.images.bridge

    def draws(self, done: int, aware: Aware | None = None) -> Iterator[Draw]:
        return drawn(self.recipe, self.draw, done, aware)

    def draw(self, number: int, t: Tensor, weight: Tensor | None) -> Draw:
        share = self.recipe.data.mix_share
        place, behind = int(number * share), int((number + 1) * share)
        if behind > place:
            return self.images.draw(number, t, weight, place)
        return self.dreams.draw(number, t, weight)

    def null(self) -> Condition:
        return self.images.null()


def gather(
    checkpoint: Checkpoint,
    folder: Folder,
    job: Job,
    source: str,
    objective: Objective,
    stopped: Callable[[], int],
) -> Generator[Event, None, Material]:
    """Make the material, or find it made; returns it."""
    for remark in remarks(job.recipe):
        yield Note(remark)
    wanted = sources_of(job)
    images = dreams = None
    rest = (folder, job, source, objective, stopped)
    if wanted.images is not None:
        images = yield from from_images(checkpoint, wanted.images, *rest)
    if wanted.dreams is not None:
        dreams = yield from from_dreams(checkpoint, *rest)
    found = Mixed(images, dreams, job.recipe) if images and dreams else images or dreams
    assert found is not None
    if found.bridge is not None:
        yield Note(found.bridge.in_words())
    return found


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
    from recast.data.cache import Store
    from recast.data.dataset import Dataset, cache_bytes, prepare, texts

    on_broken: Literal["refuse", "skip"] = "skip" if skips_broken(job) else "refuse"
    found = found_in(images, skip_broken=skips_broken(job), recipe=job.recipe)
    for problem in found.problems:
        yield Note(f"left out: {problem.what}")
    model = opened(checkpoint, job, source)
    if job.recipe.data.size:
        model = replace(model, size=job.recipe.data.size)
    student = exchange.into(model, checkpoint, job.recipe)
    fresh = not folder.path("cache").exists()
    store = Store(folder.path("cache"), student)
    store.text("")
    size = cache_bytes(found, store)
    yield Note(f"The cache of images and captions takes {amount(size)}.")
    if fresh:
        require_room(folder.root, size)
    yield from encode_captions(texts(found), store, stopped)
    yield Stage("encode images", len(found.examples), "images")
    made = []
    for entry in prepare(found, store, on_broken=on_broken):
        made.append(entry)
        if entry.problem:
            yield Note(f"left out: {entry.problem}")
        yield Tick(len(made))
        if signal := stopped():
            raise Stopped(signal, "stopped while encoding images; the same command goes on there.")
    taught, held = fixed.hold_out(made, job.recipe)
    dataset = Dataset.of(store, taught)
    bridge = exchange.bridge_of_images(model, student, dataset, folder, job.recipe)
    fixed.prepare(model, student, folder, job, objective, bridge, fixed.known(dataset, held))
    # From here on every entry is read: the encoders can leave the device's memory.
    slim = replace(student, parts={})
    dataset = replace(dataset, store=replace(store, model=slim))
    reads = trains_text(model.layout, job.recipe)
    return Images(dataset, job.recipe, objective, bridge, reads)


def from_dreams(
    checkpoint: Checkpoint,
    folder: Folder,
    job: Job,
    source: str,
    objective: Objective,
    stopped: Callable[[], int],
) -> Generator[Event, None, Replay | Selfmade]:
    """Let the original dream into the run's `pairs`, unless pairs are given already.

    Returns what was met, or what was painted.
    """
    from recast.convert import fixed

    plan = dream_plan(job, checkpoint, objective.name)
    model = opened(checkpoint, job, source)
    if job.pairs is None:
        if processes.first():
            yield from dream(model, folder.path("pairs"), plan, stopped=stopped)
        if signal := stopped():
            raise Stopped(signal, "stopped while dreaming; the same command goes on there.")
    else:
        yield Note(f"Taking the {plan.pictures} pictures that were dreamt into {job.pairs}.")
    place = job.pairs or folder.path("pairs")
    shards = tuple(read_shards(place, plan, checkpoint.sha256()))
    conditions, rows = conditions_of(model, shards, plan.size)
    about = (job.recipe, objective, job.device, model.factor)
    if sources_of(job).dreams == "replay":
        fixed.prepare(model, model, folder, job, objective, None)
        reads = trains_text(model.layout, job.recipe)
        return Replay(shards, conditions, rows, *about, reads)
    student = exchange.into(model, checkpoint, job.recipe)
    made, bridge = finished(shards, plan), None
    x0 = made.x0
    if student is not model:
        x0 = crossed(model, student, x0.to(model.device)).cpu()
        bridge = exchange.bridge_of(made.x0, x0, folder, job.recipe)
    fixed.prepare(model, student, folder, job, objective, bridge)
    row = torch.tensor([rows[prompt] for prompt in made.prompts])
    return Selfmade(x0, row, made.zeroed, conditions, *about, bridge)


def conditions_of(
    model: Model, shards: Sequence[Shard], size: int | None
) -> tuple[Condition, dict[str, int]]:
    """Conditions of all prompts that were dreamt, then zeros (ZERO) and the empty prompt's."""
    from recast.text.encode import cat

    prompts = [*dict.fromkeys(text for shard in shards for text in shard.prompts if text), ""]
    found = encoded(model, prompts, size)
    rows = {prompt: row for row, prompt in enumerate([*prompts[:-1], ZERO, ""])}
    return cat([found[:-1], found[-1].zeros(), found[-1]]), rows


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


def training_captions(job: Job, checkpoint: Checkpoint, folder: Folder) -> tuple[str, ...]:
    """What the training was told: the images' captions, the prompts that were dreamt, or both."""
    told: list[str] = []
    wanted = sources_of(job)
    if wanted.images is not None:
        found = examples_of(wanted.images, skip_broken=skips_broken(job), recipe=job.recipe)
        told += [example.caption for example in found]
    if wanted.dreams is not None:
        told += dream_plan(job, checkpoint, "flow").order()
    return tuple(told)
