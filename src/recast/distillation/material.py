"""What a student is shown: latents of the user's pictures, or of pictures that the teacher dreams.

A batch is a pure function of (seed, number), and so is a draw; a resumed run needs no position.
There are no latents made of noise: without pictures and without prompts there is no run.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from recast import processes
from recast.commit import require_room
from recast.distill.losses import check_forward
from recast.distill.sampler import TimeSampler
from recast.distillation.config import Config, Data
from recast.distillation.dreams import dreamt
from recast.dream import Plan
from recast.errors import Stopped
from recast.events import Event, Note, Stage, Tick, amount
from recast.objective import Objective
from recast.train import Draw, noised, seeded

if TYPE_CHECKING:
    from recast.checkpoint import Checkpoint
    from recast.data.dataset import Dataset
    from recast.model import Model
    from recast.text.encode import Condition

CHECKED = 4  # numbers of draws whose slope is looked at


class Material(Protocol):
    """Latents x0 (B, C, h, w) and their condition, batch by batch; `seed` names the order."""

    def batch(self, number: int, size: int, seed: int) -> tuple[Tensor, Condition]: ...


@dataclass(frozen=True)
class Images:
    """The user's pictures, encoded into the run's cache."""

    dataset: Dataset
    dropout: float

    def batch(self, number: int, size: int, seed: int) -> tuple[Tensor, Condition]:
        found = self.dataset.batch(number, seed, size, dropout=self.dropout)
        return found.x0, found.condition


def draws(
    material: Material, config: Config, objective: Objective, times: TimeSampler, device: str,
    first: int = 0,
) -> Iterator[Draw]:  # fmt: skip
    """This process's draws from number `first` on, the data contract checked on the first few."""
    for number in filter(processes.mine, count(first)):
        made = draw(material, config, objective, times, device, number)
        if number - first < CHECKED:
            check_forward(made.x, made.x0, made.eps, made.t, path=objective.path)
        yield made


def draw(
    material: Material, config: Config, objective: Objective, times: TimeSampler, device: str,
    number: int,
) -> Draw:  # fmt: skip
    """Draw `number`: pictures, noise, times, and the weights that make up for the times."""
    seed, size = config.run.seed, config.run.batch
    x0, condition = material.batch(number, size, seed)
    t, weight = times.draw(size, seeded(seed, "times", number))
    eps = torch.randn(x0.shape, generator=seeded(seed, "noise", number))
    x0, eps, t = (each.to(device) for each in (x0, eps, t))
    made = noised(objective, x0, t, eps, condition.to(torch.device(device)))
    return replace(made, weight=weight.to(device))


def plan_of(config: Config, checkpoint: Checkpoint) -> Plan:
    """What the teacher dreams of: prompts of the grammar, or of a file."""
    data = config.data
    return Plan(
        prompts=prompts_of(data, checkpoint, config.run.seed), pictures=data.pictures,
        steps=data.dream_steps, guidance=data.guidance, seed=config.run.seed,
        size=data.size or None, solver=data.solver, last=True,
    )  # fmt: skip


def prompts_of(data: Data, checkpoint: Checkpoint, seed: int) -> tuple[str, ...]:
    """Prompts put together from symbols, one for each picture, or those of a file."""
    from recast.wishes import GRAMMAR, from_grammar, prompts_for

    if data.prompts == GRAMMAR:
        return from_grammar(data.pictures, checkpoint, seed=seed, level=data.level)
    return prompts_for(Path(data.prompts) if data.prompts else None, checkpoint)


def gather(
    model: Model, config: Config, out: Path, stopped: Callable[[], int]
) -> Generator[Event, None, Material]:
    """Make the material, or find it made; returns it."""
    if config.data.images:
        return (yield from from_images(model, config, out, stopped))
    plan = plan_of(config, model.checkpoint)
    return (yield from dreamt(model, out / "pairs", plan, config.data.caption_dropout, stopped))


def from_images(
    model: Model, config: Config, out: Path, stopped: Callable[[], int]
) -> Generator[Event, None, Images]:
    """Encode pictures and captions into the run's cache."""
    from recast.data.cache import Store
    from recast.data.dataset import Dataset, cache_bytes, prepare, texts

    found = found_images(config)
    if config.data.size:
        model = replace(model, size=config.data.size)
    fresh = not (out / "cache").exists()
    store = Store(out / "cache", model)
    store.text("")
    size = cache_bytes(found, store)
    yield Note(f"The cache of images and captions takes {amount(size)}.")
    if fresh:
        require_room(out, size)
    for text in texts(found):  # all encoders before the VAE: they may take turns on the device
        store.text(text)
    yield Stage("encode images", len(found.examples), "images")
    made = []
    for entry in prepare(found, store):
        made.append(entry)
        yield Tick(len(made))
        if signal := stopped():
            raise Stopped(signal, "stopped while encoding images; the same command goes on there.")
    return Images(Dataset.of(store, made), config.data.caption_dropout)


def found_images(config: Config):  # type: ignore[no-untyped-def]
    """The user's pictures by name; raises Refused for an empty folder, naming broken ones."""
    from recast.data.gather import gather as gather_images

    return gather_images(Path(config.data.images))


def images_digest(config: Config) -> str:
    """Hash of every picture and caption; "" where the teacher dreams."""
    import hashlib

    from recast.data.cache import hash_file

    if not config.data.images:
        return ""
    found = hashlib.sha256()
    for example in found_images(config).examples:
        found.update(f"{example.name}\0{example.caption}\0{hash_file(example.path)}\n".encode())
    return found.hexdigest()[:16]
