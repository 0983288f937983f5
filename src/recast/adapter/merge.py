"""Merging whole checkpoints: weights by block, and which files may be merged at all.

    0.5              every tensor that a network reads
    OUT08=1.0        a block, a glob of blocks (OUT*), a part (unet, te, te1, te2, vae)

w is B's share; of several weights that fit a tensor the last counts. What no network reads is A's.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from recast.adapter.places import refuse_residual
from recast.checkpoint import Checkpoint
from recast.errors import Refused
from recast.layout import Layout, detect
from recast.layout.names import PART_NAMES, VAE
from recast.layout.sites import blocks
from recast.markers import read_objective

PARTS = {"unet": ("unet",), "te": ("te1", "te2"), "te1": ("te1",), "te2": ("te2",), "vae": ("vae",)}
RECIPE = "recast.merge"
CHUNK = 1 << 18  # values that are in fp32 at a time
# of A alone, untrue of the result
OWN = ("run", "recipe", "base_sha256", "adapter_role", "start", "warm", "merge")


def in_chunks(
    function: Callable[[Tensor, Sequence[Tensor]], Tensor], a: Tensor, others: Sequence[Tensor]
) -> Tensor:
    """A function that works value by value, with few values wide at a time, in the dtype of a.

    It is given fp32 (fp64 where a is); the others' dtypes may differ.
    """
    flat, rest = a.reshape(-1), [x.reshape(-1) for x in others]
    result = torch.empty_like(flat)
    work = torch.float64 if a.dtype == torch.float64 else torch.float32
    for at in range(0, len(flat), CHUNK):
        part = slice(at, at + CHUNK)
        result[part] = function(flat[part].to(work), [x[part].to(work) for x in rest])
    return result.reshape(a.shape)


@dataclass(frozen=True)
class Weights:
    """Weights by block or part: the first for every tensor, later ones for what they name."""

    rules: tuple[tuple[str, float], ...]

    def of(self, part: str, block: str) -> float:
        """The share of one tensor."""
        return [share for name, share in self.rules if _fits(name, part, block)][-1]

    def texts(self) -> list[str]:
        """As they are given on the command line."""
        return [f"{name}={share:g}" if name else f"{share:g}" for name, share in self.rules]


def shares_of(a: Checkpoint, b: Checkpoint, shares: Weights) -> dict[str, float]:
    """B's share of each tensor that a network reads, by A's names.

    Raises Refused for checkpoints of different families, sizes or objectives, for parts that B
    lacks, and for weights that name nothing.
    """
    layout = _mergeable(a, b)
    named = blocks(layout.plan)
    named |= {key: ("vae", "VAE") for key in a.specs if key.startswith(VAE)}
    every = sorted({block for _, block in named.values()})
    for name, _ in shares.rules[1:]:
        if not any(_fits(name, part, block) for part, block in named.values()):
            near = difflib.get_close_matches(name, [*PARTS, *every], 1, 0)[0]
            raise Refused(f"--weight {name}=…: no part or block is called that; is it {near}?")
    plan = {key: shares.of(part, block) for key, (part, block) in named.items() if key in a.specs}
    for key, share in plan.items():
        if share and key not in b.specs:
            part = named[key][0]
            raise Refused(
                f"{b.path} has no {key}, which the {PART_NAMES[part]} of {a.path} has: "
                f"give --weight {part}=0."
            )
        if share and a.specs[key].shape != b.specs[key].shape:
            raise Refused(
                f"{key} is {a.specs[key].shape} in {a.path} and {b.specs[key].shape} in {b.path}: "
                "merge checkpoints of one size."
            )
    return plan


def _mergeable(a: Checkpoint, b: Checkpoint) -> Layout:
    """A's layout, where both are whole checkpoints of one family and one objective."""
    found = []
    for file in (a, b):
        refuse_residual(file)
        layout = detect(file)
        evidence = read_objective(file.specs, file.metadata)
        if evidence.objective is None or evidence.contradictions:
            said = "; ".join(evidence.contradictions or evidence.reasons)
            raise Refused(
                f"{file.path} does not say clearly what it predicts ({said}): merge only files "
                "whose objective is certain."
            )
        found.append((layout, evidence.objective))
    (one, predicts), (other, predicts_too) = found
    if one.family != other.family:
        raise Refused(
            f"{a.path} is {one.family} and {b.path} is {other.family}: merge files of one family."
        )
    if predicts != predicts_too:
        raise Refused(
            f"{a.path} predicts {predicts} and {b.path} {predicts_too}, and a mean of two answers "
            "to different questions answers neither: convert one of them first."
        )
    return one


def _fits(name: str, part: str, block: str) -> bool:
    if name in PARTS:
        return part in PARTS[name]
    return name == "" or fnmatchcase(block, name)
