"""Merging whole checkpoints: a function of tensors, and weights by block.

    weighted    a + w (b - a)       in fp32, rounded once to the dtype of a

    0.5              every tensor that a network reads
    OUT08=1.0        a block, a glob of blocks (OUT*), a part (unet, te, te1, te2, vae)

w is B's share; of several weights that fit a tensor the last counts. What no network reads is A's.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor

from recast.adapter.places import refuse_residual
from recast.adapter.rebuild import CONTENT_HASHES
from recast.checkpoint import Checkpoint, write
from recast.errors import CheckFailed, Refused
from recast.layout import Layout, detect
from recast.layout.names import PART_NAMES, VAE
from recast.markers import read_objective

PARTS = {"unet": ("unet",), "te": ("te1", "te2"), "te1": ("te1",), "te2": ("te2",), "vae": ("vae",)}
RECIPE = "recast.merge"
# of A alone, untrue of the result
OWN = ("run", "recipe", "base_sha256", "adapter_role", "start", "warm", "merge")


def weighted(a: Tensor, b: Tensor, share: float) -> Tensor:
    """a + share (b - a) in the dtype of a; a share of 0 gives a's bits, of 1 those of b."""
    if share == 0:
        return a
    if share == 1:
        return b.to(a.dtype)
    work = torch.promote_types(a.dtype, torch.float32)
    return torch.lerp(a.to(work), b.to(work), share).to(a.dtype)


@dataclass(frozen=True)
class Weights:
    """B's share by block or part: the first for every tensor, later ones for what they name."""

    rules: tuple[tuple[str, float], ...]

    def of(self, part: str, block: str) -> float:
        """The share of one tensor."""
        return [share for name, share in self.rules if _fits(name, part, block)][-1]

    def texts(self) -> list[str]:
        """As they are given on the command line."""
        return [f"{name}={share:g}" if name else f"{share:g}" for name, share in self.rules]


def weights(given: Sequence[str]) -> Weights:
    """Weights from the command line's texts; the default share is 0.5.

    Raises Refused for what is no number between 0 and 1.
    """
    default, rules = 0.5, []
    for text in given:
        name, equals, number = text.rpartition("=")
        share = _share(number, text)
        if equals:
            rules.append(("IN" if name.strip() == "IN00" else name.strip(), share))
        else:
            default = share
    return Weights((("", default), *rules))


def _share(number: str, text: str) -> float:
    try:
        share = float(number)
    except ValueError as error:
        raise Refused(
            f"--weight {text}: {number!r} is no number; give B's share as 0.5, or NAME=0.5 for a "
            "block or part."
        ) from error
    if not 0 <= share <= 1 or not math.isfinite(share):
        raise Refused(f"--weight {text}: B's share is a number from 0 to 1.")
    return share


def write_merged(
    a: Checkpoint, b: Checkpoint, shares: Weights, out: Path, *, force: bool = False
) -> str:
    """Stream the merge of two checkpoints to a file and return its sha256; markers are A's."""
    plan = shares_of(a, b, shares)
    recipe = {"how": "weighted", "weights": shares.texts(), "a": a.sha256(), "b": b.sha256()}
    about = {
        key: value
        for key, value in a.metadata.items()
        if key not in CONTENT_HASHES and key not in {f"recast.{name}" for name in OWN}
    }
    about |= {"recast.role": "checkpoint", RECIPE: json.dumps(recipe)}
    specs = {key: (spec.dtype, spec.shape) for key, spec in a.specs.items()}
    return write(out, specs, merged(a, b, plan), about, force=force, sources=[a.path, b.path])


def merged(a: Checkpoint, b: Checkpoint, plan: dict[str, float]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of A in file order, merged with B's where the plan gives a share above 0."""
    for key in a.specs:
        share, tensor = plan.get(key, 0.0), a[key]
        if share:
            result = weighted(tensor, b[key], share)
            if not torch.isfinite(result).all() and torch.isfinite(tensor).all():
                raise CheckFailed(
                    f"{key} leaves the range of {tensor.dtype} when merged: "
                    "store A in bf16 or fp32."
                )
            tensor = result
            del result
        yield key, tensor
        del tensor  # before the next is read


def shares_of(a: Checkpoint, b: Checkpoint, shares: Weights) -> dict[str, float]:
    """B's share of each tensor that a network reads, by A's names.

    Raises Refused for checkpoints of different families, sizes or objectives, for parts that B
    lacks, and for weights that name nothing.
    """
    layout = _mergeable(a, b)
    named = {site.key: (site.part, site.block) for site in layout.sites("every")}
    named |= {key: ("vae", "VAE") for key in a.specs if key.startswith(VAE)}
    blocks = sorted({block for _, block in named.values()})
    for name, _ in shares.rules[1:]:
        if not any(_fits(name, part, block) for part, block in named.values()):
            near = difflib.get_close_matches(name, [*PARTS, *blocks], 1, 0)[0]
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
