"""Checkpoints of any size with seeded random weights, for tests and benchmarks.

The weights are scaled so that the networks neither die nor explode; they have learnt nothing. Each
tensor has a generator of its own, seeded by its name, so it does not depend on what else is made.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from recast.checkpoint import write
from recast.header import DTYPES
from recast.layout.blueprint import Plan, blueprint
from recast.layout.names import TEXTS, UNET
from recast.layout.spectra import draw

if TYPE_CHECKING:
    from torch import Tensor

Specs = dict[str, tuple[str, tuple[int, ...]]]


def generate(
    path: Path | str,
    plan: Plan,
    *,
    seed: int = 0,
    dtype: str = "F16",
    spectrum: str = "noise",
    metadata: Mapping[str, str] | None = None,
    extras: bool = True,
    force: bool = False,
) -> str:
    """Stream a checkpoint of a plan to a file and return its sha256.

    dtype: as safetensors names it, F8_E4M3 for instance. spectrum: of all matrices but embeddings,
    as `spectra` has them. extras: also what real files carry beside the weights (position_ids,
    logit_scale).
    """
    specs: Specs = {}
    if extras:
        specs |= _extras(plan, dtype)
    specs |= {key: (dtype, shape) for key, shape in blueprint(plan).items()}
    return write(path, specs, _tensors(specs, seed, spectrum), metadata or {}, force=force)


def _extras(plan: Plan, dtype: str) -> Specs:
    specs: Specs = {}
    prefixes = TEXTS[plan.family]
    if plan.te1:
        specs[prefixes["te1"] + "embeddings.position_ids"] = ("I64", (1, plan.te1.positions))
    if plan.te2:
        specs[prefixes["te2"] + "logit_scale"] = (dtype, ())
    return specs


def values(key: str, shape: tuple[int, ...], *, seed: int = 0, spectrum: str = "noise") -> Tensor:
    """The generated tensor of this name, in fp32."""
    import torch

    digest = hashlib.sha256(f"{seed} {key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:6], "big"))
    law = "noise" if _is_embedding(key) else spectrum
    found = draw(shape, law, generator).mul_(_scale(key, shape))
    return found.add_(1.0) if _is_gain(key, shape) else found


def _tensors(specs: Specs, seed: int, spectrum: str) -> Iterator[tuple[str, Tensor]]:
    import torch

    for key, (dtype, shape) in specs.items():
        if dtype == "I64":
            yield key, torch.arange(math.prod(shape)).reshape(shape)
        else:
            found = values(key, shape, seed=seed, spectrum=spectrum)
            yield key, found.to(getattr(torch, DTYPES[dtype][1]))
            del found  # before the next is made


def _scale(key: str, shape: tuple[int, ...]) -> float:
    """Standard deviation of a tensor's values: 1 / sqrt(fan in) for matrices."""
    if len(shape) < 2:
        return 0.05
    if _is_embedding(key):
        return 0.1
    return 1 / math.sqrt(math.prod(shape[1:]))


def _is_embedding(key: str) -> bool:
    """Whether a tensor is a text encoder's table of tokens or positions."""
    return "embedding" in key and not key.startswith(UNET)


def _is_gain(key: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is the weight of a norm."""
    return len(shape) == 1 and key.endswith(".weight")
