"""Latents and text conditions on disk, so that the VAE and the text encoders run once.

An entry's name is the hash of everything it depends on: the picture's bytes, the VAE's weights, the
crop, the precision; or the caption and the text encoders.  So nothing is ever stale, only unused.
An entry repeats its key and holds the hash of its content; one that disagrees is remade.  Entries
appear whole or not at all, and workers that make the same one write the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from recast.checkpoint import Checkpoint, write_dict
from recast.data.batches import Plan, batch, dropped, plan, zeros
from recast.data.buckets import Buckets, Fit, apply, fit, square
from recast.data.folder import Example, Folder
from recast.data.images import WHITE, header, load, to_tensor
from recast.errors import Refused
from recast.model import Model
from recast.text.encode import Condition

VERSION = 1  # of what an entry means: raise it when the same key would get another content
KEY, CONTENT = "recast.key", "recast.content"
Tensors = Mapping[str, Tensor]
Outcome = Literal["read", "made", "remade"]
Null = Literal["empty", "zero", "both"]


def fetch(
    root: Path, key: Mapping[str, Any], make: Callable[[], Tensors]
) -> tuple[Tensors, Outcome]:
    """Return the entry of a key, made and stored where it is missing or does not verify."""
    text = json.dumps(key, sort_keys=True)
    name = hashlib.sha256(text.encode()).hexdigest()
    path = root / name[:2] / f"{name}.safetensors"
    found = path.exists()
    if found and (stored := verified(path, text)) is not None:
        return stored, "read"
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in make().items()}
    write_dict(path, tensors, {KEY: text, CONTENT: content(tensors)}, force=True, twins=True)
    return tensors, "remade" if found else "made"


def verified(path: Path, key: str) -> Tensors | None:
    """Read an entry; None where its file is broken, of another key, or has changed."""
    try:
        with Checkpoint(path) as file:
            tensors = {name: file[name] for name in file}
            stated = file.metadata
    except Refused:
        return None
    if stated.get(KEY) != key or stated.get(CONTENT) != content(tensors):
        return None
    return tensors


def content(tensors: Tensors) -> str:
    """Hash names, shapes and bytes of tensors."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


@dataclass(frozen=True)
class Made:
    """One picture's entry: how it is fitted, the hash of its bytes, and what had to be done."""

    example: Example
    fit: Fit
    image: str
    outcome: Outcome
    problem: str = ""


@dataclass(frozen=True)
class Store:
    """Where entries are kept, and with which model they are made."""

    root: Path
    model: Model
    dtype: torch.dtype = torch.float32
    background: tuple[int, int, int] = WHITE

    def latent(self, example: Example, planned: Fit, image: str) -> tuple[Tensor, Outcome]:
        """Return a picture's scaled latent (C, h, w) in `dtype`; `image` hashes its bytes."""
        vae = self.model.fingerprint("vae")
        key = {
            "kind": "latent", "version": VERSION, "image": image, "vae": vae,
            "scaling": self.model.scaling, "shift": self.model.shift, "dtype": str(self.dtype),
            "fit": [planned.original, planned.scaled, planned.corner, planned.target],
            "background": self.background,
        }  # fmt: skip
        tensors, outcome = fetch(self.root, key, lambda: {"latent": self.encode(example, planned)})
        return tensors["latent"], outcome

    def encode(self, example: Example, planned: Fit) -> Tensor:
        """Decode, crop and encode one picture; refuses by name what the VAE makes no numbers of."""
        with torch.no_grad():
            latent = self.model.encode(self.pixels(example, planned))[0].to(self.dtype)
        if not latent.isfinite().all():
            raise Refused(f"{example.path}: the VAE makes NaN of it; use another VAE or precision.")
        return latent

    def pixels(self, example: Example, planned: Fit) -> Tensor:
        """Decode and crop one picture, (1, 3, H, W) in [-1, 1]."""
        picture = load(example.path, background=self.background)
        if picture.size != planned.original:
            planned = fit(picture.size, planned.target)
        return to_tensor(apply(picture, planned)).unsqueeze(0)

    def text(self, caption: str) -> tuple[Tensors, Outcome]:
        """Return a caption's context (N, D) and, where the family has one, pooled output (P,)."""
        encoders = [self.model.fingerprint(part) for part in self.model.text_parts]
        key = {
            "kind": "text", "version": VERSION, "caption": caption, "encoders": encoders,
            "dtype": str(self.model.dtype),
        }  # fmt: skip
        return fetch(self.root, key, lambda: self.encode_text(caption))

    def encode_text(self, caption: str) -> Tensors:
        """Run the text encoders on one caption."""
        with torch.no_grad():
            found = self.model.condition([caption])
        tensors = {"context": found.context[0]}
        return tensors if found.pooled is None else {**tensors, "pooled": found.pooled[0]}

    def condition(self, captions: Sequence[str], fits: Sequence[Fit]) -> Condition:
        """Return the conditions of captions at their pictures' sizes, on the model's device."""
        from recast.text.encode import cat

        rows = []
        for caption, planned in zip(captions, fits, strict=True):
            found, _ = self.text(caption)
            pooled = found.get("pooled")
            rows.append(
                Condition(
                    found["context"].unsqueeze(0),
                    None if pooled is None else pooled.unsqueeze(0),
                    None if pooled is None else torch.tensor([planned.ids], dtype=torch.float32),
                )
            )
        return cat(rows).to(self.model.device)


def prepare(
    folder: Folder,
    store: Store,
    *,
    buckets: Buckets | None = None,
    on_broken: Literal["refuse", "skip"] = "refuse",
) -> Iterator[Made]:
    """Make or verify every picture's latent, then every caption's condition; yields per picture.

    Default buckets: one square of the model's size.  With `skip`, a picture that cannot be
    decoded is yielded with its problem, and `Dataset.of` leaves it out.
    """
    table = buckets or square(store.model.size)
    for example in folder.examples:
        try:
            size = example.size or header(example.path).size
            planned = fit(size, table.choose(size))
            image = hash_file(example.path)
            _, outcome = store.latent(example, planned, image)
            store.text(example.caption)
        except Refused as error:
            if on_broken == "refuse":
                raise
            nothing = Fit((0, 0), (0, 0), (0, 0), (0, 0))
            yield Made(example, nothing, "", "made", str(error))
        else:
            yield Made(example, planned, image, outcome)


def hash_file(path: Path) -> str:
    """Hash a file's bytes."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise Refused(f"{path}: cannot be read ({error.strerror}).") from error


@dataclass(frozen=True)
class Batch:
    """x0 (B, C, h, w) float32 on the model's device, what it is conditioned on, which examples."""

    x0: Tensor
    condition: Condition
    index: Tensor


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
        `zero_share` of them by zeros.
        """
        index = batch(self.plan, step, seed, size)
        entries = [self.entries[i] for i in index]
        latents = [self.store.latent(e.example, e.fit, e.image)[0] for e in entries]
        without = [dropped(seed, step, place, dropout) for place in range(size)]
        share = {"empty": 0.0, "zero": 1.0, "both": zero_share}[null]
        zeroed = [gone and zeros(seed, step, k, share) for k, gone in enumerate(without)]
        captions = [
            "" if gone else entry.example.caption
            for entry, gone in zip(entries, without, strict=True)
        ]
        condition = self.store.condition(captions, [entry.fit for entry in entries])
        device = self.store.model.device
        if any(zeroed):
            condition = condition.zeros().where(torch.tensor(zeroed, device=device), condition)
        x0 = torch.stack(latents).to(device, torch.float32)
        return Batch(x0, condition, torch.tensor(index))
