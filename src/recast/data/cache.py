"""Latents and text conditions on disk, so that the VAE and the text encoders run once.

An entry's name is the hash of everything it depends on: the picture's bytes, the VAE's weights, the
crop, the precision; or the caption and the text encoders.  So nothing is ever stale, only unused.
An entry repeats its key and holds the hash of its content; one that disagrees is remade.  Entries
appear whole or not at all, and workers that make the same one write the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from recast.checkpoint import Checkpoint, write_dict
from recast.data.buckets import Fit, apply, fit
from recast.data.folder import Example
from recast.data.images import WHITE, Picture, load, to_tensor
from recast.data.masks import mask_of
from recast.errors import Refused
from recast.model import Model
from recast.text.encode import Condition

VERSION = 1  # of what an entry means: raise it when the same key would get another content
KEY, CONTENT = "recast.key", "recast.content"
Tensors = Mapping[str, Tensor]
Outcome = Literal["read", "made", "remade"]


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
            "fit": planned.key,
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
            other = fit(picture.size, planned.target)
            planned = replace(planned, scaled=other.scaled, corner=other.corner)
        return to_tensor(apply(picture, planned)).unsqueeze(0)

    def mask(self, example: Example, planned: Fit, image: str) -> Tensor:
        """Return what each place of a picture's latent counts, (1, h, w) in [0, 1]."""
        file = None if example.mask is None else hash_file(example.mask)
        key = {
            "kind": "mask", "version": VERSION, "image": image, "mask": file,
            "alpha": example.how.alpha_mask, "fit": planned.key, "factor": self.model.factor,
        }  # fmt: skip
        found, _ = fetch(
            self.root, key, lambda: {"mask": mask_of(example, planned, self.model.factor)}
        )
        return found["mask"]

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


def hash_file(path: Picture) -> str:
    """Hash a file's bytes, or a packed picture's."""
    try:
        if not isinstance(path, Path):
            return hashlib.sha256(path.read()).hexdigest()
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise Refused(f"{path}: cannot be read ({error.strerror}).") from error
