"""Dreamt pictures and the conditions of their prompts: any number, a bounded part of it in memory.

    pairs/pairs-NNNNN.safetensors   what was dreamt; a picture's latents are x - t u
    pairs/texts/                    a condition for each prompt, encoded once, then only read

What was read last stays in memory, HELD bytes of latents and as many of conditions.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch import Tensor

from recast import processes
from recast.commit import require_room
from recast.data.cache import Tensors, fetch
from recast.distillation.folder import read_json, write_json
from recast.dream import Plan, dream, read_shard, shard_path, shards
from recast.errors import Stopped
from recast.events import Event, Note, Stage, Tick, amount
from recast.train import seeded

if TYPE_CHECKING:
    from recast.model import Model
    from recast.text.encode import Condition

AT_ONCE = 32  # prompts that the text encoders take together
HELD = 1 << 28  # bytes that are kept of what was read
VERSION = 1  # of what an entry of a prompt means
DONE = "texts.json"  # says that every prompt has its entry
Value = TypeVar("Value")


@dataclass
class Kept(Generic[Value]):
    """Values by number, those used last in memory: `most` bytes of them, and one at least."""

    read: Callable[[int], Value]
    size: Callable[[Value], int]
    most: int = HELD
    nbytes: int = 0
    held: OrderedDict[int, Value] = field(default_factory=OrderedDict)

    def __call__(self, number: int) -> Value:
        if number in self.held:
            self.held.move_to_end(number)
            return self.held[number]
        value = self.held[number] = self.read(number)
        self.nbytes += self.size(value)
        while self.nbytes > self.most and len(self.held) > 1:
            _, gone = self.held.popitem(last=False)
            self.nbytes -= self.size(gone)
        return value


@dataclass
class Latents:
    """What the pictures of a finished dream ended as; a shard in `folder` has `each` of them."""

    folder: Path
    guidance: float
    each: int
    kept: Kept[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.kept = Kept(self.shard, lambda x0: x0.nbytes)

    def __getitem__(self, pictures: Tensor) -> Tensor:
        """(B, C, h, w), float32."""
        places = (divmod(picture, self.each) for picture in pictures.tolist())
        return torch.stack([self.kept(number)[place] for number, place in places])

    def shard(self, number: int) -> Tensor:
        """What a shard's pictures ended as, (B, C, h, w)."""
        return read_shard(shard_path(self.folder, number)).latents(self.guidance)


@dataclass
class Texts:
    """Conditions of prompts, stored in `root`; contexts are repeated to `length` tokens.

    A prompt is encoded along with its group, on which its last bits may depend.
    """

    root: Path
    model: Model
    prompts: tuple[str, ...]
    size: int | None
    length: int = 0
    kept: Kept[Condition] = field(init=False)

    def __post_init__(self) -> None:
        self.kept = Kept(self.one, nbytes_of)

    def __getitem__(self, rows: Tensor) -> Condition:
        from recast.text.encode import cat

        found = [self.kept(row) for row in rows.tolist()]
        return cat([each.lengthened(self.length // each.context.shape[1]) for each in found])

    def one(self, row: int) -> Condition:
        """The condition of a row; made with its group where its entry is missing or damaged."""
        first = row - row % AT_ONCE
        return self.fetched(row, lambda: self.encoded(first))

    def group(self, first: int) -> Iterator[Condition]:
        """The conditions of the group that begins at a row, made where any is missing."""
        made = cache(lambda: self.encoded(first))
        for row in range(first, min(first + AT_ONCE, len(self.prompts))):
            yield self.fetched(row, made)

    def fetched(self, row: int, made: Callable[[], list[Tensors]]) -> Condition:
        from recast.text.encode import Condition

        tensors, _ = fetch(self.root, self.key(row), lambda: made()[row % AT_ONCE])
        return Condition(**{name: tensor[None] for name, tensor in tensors.items()})

    def encoded(self, first: int) -> list[Tensors]:
        """The tensors of each prompt of a group."""
        with torch.no_grad():
            found = self.model.condition(self.prompts[first : first + AT_ONCE], size=self.size)
        parts = {name: each for name, each in vars(found).items() if each is not None}
        # copies: an entry that is kept would keep its whole group otherwise
        return [{name: each[k].clone() for name, each in parts.items()} for k in range(len(found))]

    def key(self, row: int) -> dict[str, object]:
        """Everything that an entry depends on."""
        first = row - row % AT_ONCE
        group = "\0".join(self.prompts[first : first + AT_ONCE])
        return {
            "kind": "prompt", "version": VERSION, "row": row % AT_ONCE,
            "group": hashlib.sha256(group.encode()).hexdigest(), **self.about(),
        }  # fmt: skip

    def about(self) -> dict[str, object]:
        """What all entries depend on."""
        model = self.model
        size = model.pixels(self.size)
        return {"model": model.checkpoint.sha256(), "dtype": str(model.dtype), "size": size}

    def digest(self) -> str:
        """Names the entries of all prompts."""
        text = json.dumps([self.about(), self.prompts, VERSION], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def nbytes_of(condition: Condition) -> int:
    """Bytes of a condition's tensors."""
    return sum(each.nbytes for each in vars(condition).values() if each is not None)


def encode(texts: Texts, stopped: Callable[[], int]) -> Generator[Event, None, None]:
    """Give every prompt its entry, or find that done. Raises NoRoom, and Stopped on a signal."""
    digest, count = texts.digest(), len(texts.prompts)
    known = read_json(texts.root / DONE)
    if known.get("digest") == digest:
        texts.length = int(str(known["length"]))
        return
    yield Stage("encode prompts", count, "prompts")
    lengths = set()
    for first in range(0, count, AT_ONCE):
        group = list(texts.group(first))
        lengths |= {each.context.shape[1] for each in group}
        done = first + len(group)
        if not first:
            size = sum(map(nbytes_of, group)) * count // done
            there = sum(1 for _ in texts.root.glob("*/*.safetensors"))
            require_room(texts.root, size * max(0, count - there) // count)
            yield Note(f"The conditions of {count} prompts take {amount(size)}.")
        yield Tick(done)
        if done < count and (signal := stopped()):
            raise Stopped(signal, "stopped while encoding prompts; the same command goes on there.")
    texts.length = math.lcm(*lengths)
    write_json(texts.root / DONE, {"digest": digest, "length": texts.length})


@dataclass(frozen=True)
class Dreams:
    """Pictures (N,) of a dream, and the rows (N,) of their prompts; the texts' last row is ""."""

    latents: Latents
    pictures: Tensor
    row: Tensor
    texts: Texts
    dropout: float

    def batch(self, number: int, size: int, seed: int) -> tuple[Tensor, Condition]:
        """Latents and conditions: some pictures, without their prompt as often as it is dropped."""
        generator = seeded(seed, "pictures", number)
        index = torch.randint(len(self.pictures), (size,), generator=generator)
        gone = torch.rand(size, generator=generator) < self.dropout
        row = torch.where(gone, len(self.texts.prompts) - 1, self.row[index])
        return self.latents[self.pictures[index]], self.texts[row]

    def some(self, index: list[int]) -> Dreams:
        """Those pictures alone."""
        return replace(self, pictures=self.pictures[index], row=self.row[index])


def dreamt(
    model: Model, folder: Path, plan: Plan, dropout: float, stopped: Callable[[], int]
) -> Generator[Event, None, Dreams]:
    """Let the model dream into `folder`, or find that done. Raises Stopped on a signal."""
    prompts = plan.order()
    known = [*dict.fromkeys(text for text in prompts if text), ""]
    texts = Texts(folder / "texts", model, tuple(known), plan.size)
    yield from encode(texts, stopped)
    if processes.first():
        yield from dream(model, folder, plan, stopped=stopped)
    if signal := stopped():
        raise Stopped(signal, "stopped while dreaming; the same command goes on there.")
    counts = [len(found) for _, found in shards(folder, plan, model.checkpoint.sha256())]
    rows = {text: row for row, text in enumerate(known)}
    row = torch.tensor([rows[text] for text in prompts])
    latents = Latents(folder, plan.guidance, counts[0])
    return Dreams(latents, torch.arange(len(prompts)), row, texts, dropout)
