"""The weights of an adapter that have singular values, each read from the file when it is used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from recast.adapter.formats import (
    FULL_SUFFIXES,
    LOW_RANK_SUFFIXES,
    Raw,
    Tensors,
    plain_factors,
)
from recast.errors import Refused
from recast.layout import Site
from recast.layout.loras import foreign
from recast.surgery.dora import baked
from recast.surgery.thin import Core, core

A = TypeVar("A")
B = TypeVar("B")
DORA = "dora_scale"
KNOWN = {*LOW_RANK_SUFFIXES, *FULL_SUFFIXES, DORA}
HELD = 128  # rank up to which a core is kept and not computed again; 256 kB


@dataclass(frozen=True)
class Piece:
    """One module's change of a matrix or convolution: factors, Tucker, full, or DoRA.

    shape is that of the change, dtype the file's. full: there are no thin factors. weight reads
    what DoRA changes. singular: falling; None before `measured`.
    """

    path: Path
    lora: str
    tensors: Mapping[str, Tensor]
    shape: tuple[int, ...]
    dtype: str
    full: bool
    weight: Callable[[], Tensor] | None = None
    held: Core | None = None
    singular: Tensor | None = None

    @property
    def conv(self) -> bool:
        """Whether the kernel is larger than 1x1."""
        return prod(self.shape[2:]) > 1

    @property
    def numbers(self) -> int:
        """Numbers stored for each direction."""
        return self.shape[0] + prod(self.shape[1:])

    @property
    def short(self) -> int:
        """The short side of the weight as a matrix."""
        return min(self.shape[0], prod(self.shape[1:]))

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """up (O, r), down (r, I[, kh, kw]) and their scale; a full change has a unit factor."""
        if not self.full:
            return self._thin()
        delta = self.delta()
        unit = torch.eye(self.short, dtype=torch.float64)
        if self.short == len(delta):
            return unit, delta, 1.0
        return delta.flatten(1), unit.reshape(self.short, *self.shape[1:]), 1.0

    def delta(self) -> Tensor:
        """The change of a full piece; DoRA's in fp64."""
        if "diff" in self.tensors:
            return self.tensors["diff"]
        assert self.weight is not None
        up, down, scale = self._thin()
        weight = self.weight()
        change = scale * (up.double() @ down.double().flatten(1)).reshape(weight.shape)
        return baked(weight, change, self.tensors[DORA]).reshape(self.shape)

    def _thin(self) -> tuple[Tensor, Tensor, float]:
        up, down = plain_factors(self.path, self.lora, self.tensors)
        alpha = self.tensors.get("alpha")
        return up, down, 1.0 if alpha is None else alpha.double().item() / len(down)

    def core(self) -> Core:
        """The core of the factors."""
        if self.held is not None:
            return self.held
        up, down, scale = self.factors()
        return core(up, down, scale, name=f"{self.path}: {self.lora}")

    def measured(self) -> Piece:
        """With its singular values, and the core where that is small."""
        found = self.core()
        held = found if len(found.left) <= HELD else None
        return replace(self, held=held, singular=found.singular)


def pieces(path: Path, raw: Raw) -> dict[str, Piece]:
    """The pieces of an open adapter by kohya's names; norms and biases are none.

    Raises Refused for other parametrizations than DoRA, which have no factors.
    """
    found = {}
    for lora, tensors in raw.modules.items():
        assert isinstance(tensors, Tensors)
        if strange := sorted(tensors.keys() - KNOWN):
            kind = foreign(tensors.keys_in_file[strange[0]])
            raise Refused(
                f"{path}: {lora} is {kind[1] if kind else strange[0]}, which has no factors to "
                "cut; merge the file into its checkpoint with the tool that made it and take "
                "recast extract --tuned."
            )
        full = "diff" in tensors and len(tensors.spec("diff").shape) > 1
        if full or "lora_up.weight" in tensors:
            spec = tensors.spec("diff" if full else "lora_down.weight")
            shape = spec.shape if full else _shape(tensors)
            found[lora] = Piece(path, lora, tensors, shape, spec.dtype, full or DORA in tensors)
    return found


def others(raw: Raw, taken: Mapping[str, Piece]) -> Iterator[tuple[str, str]]:
    """Module and suffix of every tensor that belongs to no piece: norms and biases."""
    for lora, tensors in raw.modules.items():
        for suffix in ("diff", "diff_b", "w_norm", "b_norm"):
            if suffix in tensors and not (suffix == "diff" and lora in taken):
                yield lora, suffix


def _shape(tensors: Tensors) -> tuple[int, ...]:
    down = tensors.spec("lora_down.weight").shape
    if "lora_mid.weight" in tensors:
        down = (*down[:2], *tensors.spec("lora_mid.weight").shape[2:])
    return (tensors.spec("lora_up.weight").shape[0], *down[1:])


def placed(
    path: Path, found: Mapping[str, Piece], sites: Iterable[Site], where: str
) -> dict[str, Site]:
    """The site of each piece. Raises Refused where a checkpoint has none, or of another size."""
    known = {site.lora: site for site in sites if site.param == "weight"}
    lost = [lora for lora in found if lora not in known]
    wrong = [
        lora
        for lora, piece in found.items()
        if lora in known and prod(known[lora].shape) != piece.shape[0] * prod(piece.shape[1:])
    ]
    if lost or wrong:
        what = "are not in" if lost else "have other shapes in"
        first = ", ".join((lost or wrong)[:3])
        raise Refused(
            f"{len(lost or wrong)} of {len(found)} modules of {path} {what} {where}, first "
            f"{first}: give the checkpoint that the adapter is for."
        )
    return {lora: known[lora] for lora in found}


def spread(function: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
    """function of each item, in order, by as many threads as torch may use, each with one."""
    threads = torch.get_num_threads()
    if threads == 1:
        yield from map(function, items)
        return
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            yield from pool.map(function, items)
    finally:
        torch.set_num_threads(threads)
