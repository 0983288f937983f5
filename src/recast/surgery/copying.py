"""Tensors on their way from one adapter file to another, in bytes but for a weight and an alpha."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recast.adapter.formats import FULL_SUFFIXES, Tensors
from recast.errors import Refused

WEIGHTED = ("lora_up.weight", *FULL_SUFFIXES)


@dataclass(frozen=True)
class Copy:
    """One tensor of a module, times a weight; alpha: the number that is written instead of it."""

    tensors: Tensors
    suffix: str
    weight: float = 1.0
    alpha: float | None = None

    def spec(self) -> tuple[str, tuple[int, ...]]:
        """Dtype and shape of what is written."""
        if self.alpha is not None:
            return "F32", ()
        found = self.tensors.spec(self.suffix)
        return found.dtype, found.shape

    def read(self) -> Tensor:
        """What is written; its file's own bytes where the weight is 1.

        Raises Refused for NaN and infinity, in the file or by the weight.
        """
        if self.alpha is not None:
            return torch.tensor(self.alpha)
        tensor = self.tensors[self.suffix]
        found = tensor if self.weight == 1 else (tensor.double() * self.weight).to(tensor.dtype)
        if not torch.isfinite(found).all():
            raise Refused(
                f"{self.tensors.file.path}: {self.tensors.keys_in_file[self.suffix]} holds NaN or "
                f"infinity, or gets them times {self.weight:g}; take an earlier save or a smaller "
                "strength."
            )
        return found


def copied(tensors: Tensors, weight: float, alpha: float | None) -> dict[str, Copy]:
    """A module's tensors by their names in its file, the change times a weight.

    alpha: written for factors instead of their own, which goes into `up`; None keeps it.
    """
    change = alpha is not None and "lora_down.weight" in tensors
    found = {}
    for suffix, key in tensors.keys_in_file.items():
        factor = weight if suffix in WEIGHTED else 1.0
        if alpha is not None and change and suffix == "lora_up.weight":
            factor *= alpha_in(tensors) / alpha
        found[key] = Copy(tensors, suffix, factor)
    if change:
        found[_alpha_key(tensors)] = Copy(tensors, "alpha", alpha=alpha)
    return found


def alpha_in(tensors: Tensors) -> float:
    """A low-rank module's alpha; without one, its rank, which means scale 1."""
    if "alpha" in tensors:
        return tensors["alpha"].double().item()
    return float(tensors.spec("lora_down.weight").shape[0])


def _alpha_key(tensors: Tensors) -> str:
    """The alpha's name in a module's file, whether or not it is there."""
    known = tensors.keys_in_file.get("alpha")
    down = tensors.keys_in_file["lora_down.weight"]
    return known or f"{down.removesuffix('.weight').rpartition('.')[0]}.alpha"
