"""Pooled features of noised latents, chunk by chunk on disk, so that the same command goes on.

    x = alpha(t) x0 + sigma(t) eps, on the teacher's path        net(x, t') -> features, t, t'

t' is t, but for the mismatch control and for t_signal = noise_level, where it is any other time.
A chunk is a pure function of (settings, split, number).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recast.assessing.settings import Settings, Split
from recast.checkpoint import Checkpoint, write_dict
from recast.distill.losses import check_forward
from recast.distill.taps import FeatureTap, pool
from recast.errors import Refused
from recast.events import Event, Stage, Tick
from recast.timesteps import stratified
from recast.train import seeded

if TYPE_CHECKING:
    from recast.distillation.material import Material
    from recast.model import Model

CHUNK = 512  # samples of a file
POSITIONS = 4096  # latent positions in one forward: 64 pictures of 64 pixels
KEY = "recast.features"


@dataclass(frozen=True)
class Features:
    """Pooled features, block -> (N, C), of latents noised to `t` and told `fed`, (N,) each."""

    pooled: dict[str, Tensor]
    t: Tensor
    fed: Tensor

    def to(self, device: torch.device) -> Features:
        """The same on a device."""
        pooled = {name: each.to(device) for name, each in self.pooled.items()}
        return Features(pooled, self.t.to(device), self.fed.to(device))


@dataclass(frozen=True)
class Place:
    """Where a network's features lie and what names them; `control`: the random network."""

    folder: Path
    digest: str
    control: bool = False

    def path(self, split: Split, number: int) -> Path:
        return (
            self.folder
            / f"{'random' if self.control else 'teacher'}-{split}-{number:05d}.safetensors"
        )


def collect(
    model: Model,
    material: Mapping[str, Material],
    settings: Settings,
    place: Place,
    splits: tuple[Split, ...],
    stopped: Callable[[], int],
) -> Generator[Event, None, dict[Split, Features] | None]:
    """Make every split's missing chunks and return them all; None where the user stopped it.

    Raises Refused for chunks of another run, and for features that overflow.
    """
    work = [(split, number) for split in splits for number in chunks(settings, place, split)]
    name = "random network" if place.control else "features"
    yield Stage(name, len(work) * CHUNK, "samples")
    with FeatureTap(model.unet, where=settings.where) as tap:
        for done, (split, number) in enumerate(work, 1):
            path = place.path(split, number)
            if not _present(path, place.digest):
                if stopped():
                    return None
                part = "test" if split == "mismatch" else split
                made = chunk(model, tap, material[part], settings, split, number)
                write_dict(path, made, {KEY: place.digest}, force=True)
            yield Tick(done * CHUNK)
    return {split: _read(place, settings, split) for split in splits}


def chunks(settings: Settings, place: Place, split: Split) -> range:
    """The numbers of a split's chunks."""
    return range(-(-settings.count(split, control=place.control) // CHUNK))


@torch.no_grad()
def chunk(
    model: Model, tap: FeatureTap, material: Material, settings: Settings, split: Split, number: int
) -> dict[str, Tensor]:
    """One chunk: block -> (512, C), and "t" and "fed" (512,)."""
    seed, path = (settings.seed, split, number), model.objective.path
    t = stratified(CHUNK, seeded(*seed, "times"))
    fed = t
    if split == "mismatch" or settings.t_signal == "noise_level":
        fed = stratified(CHUNK, seeded(*seed, "fed"))
    found: dict[str, list[Tensor]] = {}
    done = 0
    while done < CHUNK:
        size = batch_of(model)
        rows = slice(done, done + size)
        x0, condition = material.batch(number * CHUNK + done, size, _order(settings, split))
        x0, now, told = x0[: CHUNK - done].float().cpu(), t[rows], fed[rows]
        eps = torch.randn(x0.shape, generator=seeded(*seed, "noise", done))
        x = model.objective.noise(x0, eps, now)
        if done == 0:
            check_forward(x, x0, eps, now, path=path)
        ask = model.net(condition[: len(x0)])
        ask(x.to(model.device), told.to(model.device))
        for name, feature in pool(tap.taken(), settings.pooling).items():
            found.setdefault(name, []).append(feature.cpu())
        done += len(x0)
    return {**{name: torch.cat(rows) for name, rows in found.items()}, "t": t, "fed": fed}


def batch_of(model: Model) -> int:
    """How many pictures of the model's size go through it at once."""
    _, height, width = model.latent_shape()
    return max(1, min(64, POSITIONS // (height * width)))


def _order(settings: Settings, split: Split) -> int:
    """A seed of its own for each split's order of pictures."""
    return int(seeded(settings.seed, "order", split).initial_seed() % (1 << 31))


def _present(path: Path, digest: str) -> bool:
    if not path.exists():
        return False
    with Checkpoint(path) as file:
        if file.metadata.get(KEY) == digest:
            return True
    raise Refused(
        f"{path} is of another run: give another --out, or --force to replace what is there."
    )


def _read(place: Place, settings: Settings, split: Split) -> Features:
    """A split's samples, as many as the settings say, on the CPU."""
    rows: dict[str, list[Tensor]] = {}
    for number in chunks(settings, place, split):
        with Checkpoint(place.path(split, number)) as file:
            for name in file:
                rows.setdefault(name, []).append(file[name])
    count = settings.count(split, control=place.control)
    whole = {name: torch.cat(each)[:count] for name, each in rows.items()}
    t, fed = whole.pop("t"), whole.pop("fed")
    return Features(whole, t, fed)


def batches(features: Features, size: int, seed: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Batches without end, a permutation of all samples after the other; (features, t)."""
    epoch = 0
    while True:
        order = torch.randperm(len(features.t), generator=seeded(seed, "epoch", epoch))
        order = order.to(features.t.device)
        for rows in order.split(size):
            if len(rows) == size:
                yield {name: each[rows] for name, each in features.pooled.items()}, features.t[rows]
        epoch += 1
