"""Prepared pictures, and the batches that are drawn of them.

A sample is one way to show a picture and one way to say its caption, both chosen by (seed, step,
place) among those that were encoded before the run; so a batch needs no encoder, and a resumed run
draws the same ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from recast.data.batches import Plan, batch, dropped, epoch, plan, uniform, zeros
from recast.data.buckets import Buckets, Fit
from recast.data.cache import Outcome, Store, hash_file
from recast.data.captions import said, variants
from recast.data.folder import Example, Folder
from recast.data.images import header
from recast.data.looks import looks
from recast.errors import Refused
from recast.text.encode import Condition

ABOUT = 450  # bytes of an entry's header
Null = Literal["empty", "zero", "both"]


@dataclass(frozen=True)
class Made:
    """One picture's entry: how it is fitted, the hash of its bytes, and what had to be done.

    `fits` are all ways to show it, the first one `fit`.
    """

    example: Example
    fit: Fit
    image: str
    outcome: Outcome
    problem: str = ""
    fits: tuple[Fit, ...] = ()

    def shown(self, seed: int, step: int, place: int) -> Fit:
        """How the picture is shown at a place of a batch."""
        if len(self.fits) < 2:
            return self.fit
        return self.fits[int(uniform(seed, "look", step, place) * len(self.fits))]

    def told(self, seed: int, step: int, place: int) -> str:
        """What is said of the picture at a place of a batch."""
        caption, how = self.example.caption, self.example.how
        count = variants(caption, how)
        chosen = int(uniform(seed, "words", step, place) * count) if count > 1 else 0
        return said(caption, how, chosen)


def prepare(
    folder: Folder,
    store: Store,
    *,
    buckets: Buckets | None = None,
    on_broken: Literal["refuse", "skip"] = "refuse",
) -> Iterator[Made]:
    """Make or verify every picture's latents, then its captions' conditions; yields per picture.

    Default buckets: those of its folder's settings.  With `skip`, a picture that cannot be
    decoded is yielded with its problem, and `Dataset.of` leaves it out.
    """
    tables = {}
    for example in folder.examples:
        sizes = example.how.sizes
        if sizes not in tables:
            tables[sizes] = buckets or sizes.table(store.model.size)
        try:
            yield made(example, store, tables[sizes])
        except Refused as error:
            if on_broken == "refuse":
                raise
            nothing = Fit((0, 0), (0, 0), (0, 0), (0, 0))
            yield Made(example, nothing, "", "made", str(error))


def made(example: Example, store: Store, table: Buckets) -> Made:
    """Make or verify whatever one picture may be drawn as."""
    size = example.size or header(example.path).size
    image = hash_file(example.path)
    fits = looks(size, table.choose(size), example.how, image)
    outcomes = []
    for planned in fits:
        outcomes.append(store.latent(example, planned, image)[1])
        if example.how.masked:
            store.mask(example, planned, image)
    for number in range(variants(example.caption, example.how)):
        store.text(said(example.caption, example.how, number))
    worst: Outcome = next((o for o in ("remade", "made") if o in outcomes), "read")
    return Made(example, fits[0], image, worst, fits=fits)


@dataclass(frozen=True)
class Batch:
    """x0 (B, C, h, w) float32 on the model's device, what it is conditioned on, which examples.

    `weight` (B,) is what each sample counts, `mask` (B, 1, h, w) what each place does; None where
    all count alike. `captions` are the texts behind the condition.
    """

    x0: Tensor
    condition: Condition
    index: Tensor
    weight: Tensor | None = None
    mask: Tensor | None = None
    captions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Dataset:
    """Prepared pictures and the order they come in."""

    store: Store
    entries: tuple[Made, ...]
    plan: Plan

    @classmethod
    def of(cls, store: Store, made: Iterable[Made]) -> Dataset:
        """Collect what `prepare` yields; raises Refused where no picture is usable."""
        entries = tuple(entry for entry in made if not entry.problem)
        targets = [entry.fit.target for entry in entries]
        return cls(store, entries, plan(targets, [entry.example.repeats for entry in entries]))

    def __len__(self) -> int:
        return len(self.entries)

    def batch(
        self,
        step: int,
        seed: int,
        size: int,
        *,
        dropout: float = 0.0,
        null: Null = "empty",
        zero_share: float = 0.5,
    ) -> Batch:
        """Return batch `step`: a pure function of its arguments, entries remade where they must be.

        dropout: the share of captions replaced by the empty prompt, by zeros, or by both, then
        `zero_share` of them by zeros; a folder's own share and epochs come first.
        """
        index = batch(self.plan, step, seed, size)
        entries = [self.entries[i] for i in index]
        fits = [entry.shown(seed, step, place) for place, entry in enumerate(entries)]
        latents = [
            self.store.latent(e.example, planned, e.image)[0]
            for e, planned in zip(entries, fits, strict=True)
        ]
        without = [
            self.unsaid(entry.example, step, seed, size, place, dropout)
            for place, entry in enumerate(entries)
        ]
        share = {"empty": 0.0, "zero": 1.0, "both": zero_share}[null]
        zeroed = [gone and zeros(seed, step, k, share) for k, gone in enumerate(without)]
        captions = tuple(
            "" if gone else entry.told(seed, step, place)
            for place, (entry, gone) in enumerate(zip(entries, without, strict=True))
        )
        condition = self.store.condition(captions, fits)
        device = self.store.model.device
        if any(zeroed):
            condition = condition.zeros().where(torch.tensor(zeroed, device=device), condition)
        x0 = torch.stack(latents).to(device, torch.float32)
        weight, mask = self.counted(entries, fits, x0)
        return Batch(x0, condition, torch.tensor(index), weight, mask, captions)

    def unsaid(
        self, example: Example, step: int, seed: int, size: int, place: int, dropout: float
    ) -> bool:
        """Whether the caption at a place of a batch is left out."""
        own, every = example.how.caption_dropout_rate, example.how.caption_dropout_every_n_epochs
        if every and (epoch(self.plan, step, size) + 1) % every == 0:
            return True
        return dropped(seed, step, place, dropout if own is None else own)

    def counted(
        self, entries: list[Made], fits: list[Fit], x0: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """(weights, masks) of a batch's samples, each None where all are 1."""
        weights = [entry.example.how.loss_weight for entry in entries]
        weight = None if set(weights) == {1.0} else torch.tensor(weights).to(x0)
        if not any(entry.example.how.masked for entry in entries):
            return weight, None
        whole = torch.ones_like(x0[0, :1]).cpu()
        masks = [
            self.store.mask(e.example, planned, e.image) if e.example.how.masked else whole
            for e, planned in zip(entries, fits, strict=True)
        ]
        return weight, torch.stack(masks).to(x0)


def texts(folder: Folder) -> Iterator[str]:
    """Yield every text that the captions of a folder are said as, each once."""
    seen: set[str] = set()
    for example in folder.examples:
        for number in range(variants(example.caption, example.how)):
            text = said(example.caption, example.how, number)
            if text not in seen:
                seen.add(text)
                yield text


def cache_bytes(folder: Folder, store: Store) -> int:
    """Return how many bytes a folder's latents and conditions take on disk, from sizes alone."""
    model, total = store.model, 0
    for example in folder.examples:
        size = example.size or header(example.path).size
        target = example.how.sizes.table(model.size).choose(size)
        count = len(looks(size, target, example.how, ""))
        channels, height, width = model.latent_shape((target[1], target[0]))
        numbers = (channels + example.how.masked) * height * width
        total += count * (numbers * 4 + ABOUT)
    each = sum(tensor.nbytes for tensor in store.text("")[0].values()) + ABOUT
    return total + each * (1 + sum(1 for text in texts(folder) if text))
