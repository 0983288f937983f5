"""A patch: what training changed, alone, in names that ComfyUI loads on the original.

A conversion's patch says what its base predicted, what it makes of that, and how its base looked
(`fingerprint`), so that it can be tried on a relative: another fine-tune of the family.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from recast.adapter.file import Adapter
from recast.adapter.fingerprint import Distance, distance, fingerprint, parse_fingerprint
from recast.adapter.formats import read_adapter
from recast.adapter.places import places, refuse_residual
from recast.adapter.rebuild import change, changed, check_pair, rebuild
from recast.checkpoint import Checkpoint
from recast.errors import Refused
from recast.layout import detect
from recast.lowrank import Full, LowRank, truncate

# distance of the UNets, in norms of the patch's base, above which a patch is refused: the farthest
# relative of bench/patch that still gained by it was .29 away; at .75 it was worth nothing
FAR = 0.3
SOURCE, PRINT = "recast.source", "recast.fingerprint"


def patch_from(initial: Adapter | None, trained: Adapter, *, rank: int | None = None) -> Adapter:
    """trained - initial as an adapter of its own, of role `delta`, or `full` without factors.

    Low-rank differences are re-factored: rank None keeps 2r, which is exact. initial None is meant
    for an adapter that is a change already.
    """
    check_pair(initial, trained)
    entries: dict[str, LowRank | Full] = {}
    for name, entry in trained.entries.items():
        delta = change(None if initial is None else initial.entries[name], entry)
        entries[name] = truncate(delta, rank) if isinstance(delta, LowRank) else delta
    return as_change(entries, trained)


def combined(patches: Sequence[Adapter]) -> Adapter:
    """The sum of changes that were made one after the other, with the first one's base."""
    entries: dict[str, LowRank | Full] = {}
    for patch in patches:
        for name, entry in patch.entries.items():
            entries[name] = added(entries[name], entry) if name in entries else entry
    return as_change(entries, patches[0])


def added(one: LowRank | Full, other: LowRank | Full) -> LowRank | Full:
    """The sum of two changes of one parameter: factors side by side, or both in full."""
    if isinstance(one, LowRank) and isinstance(other, LowRank):
        return LowRank(torch.cat([one.up, other.up], 1), torch.cat([one.down, other.down]))
    return Full(one.dense() + other.dense())


def as_change(entries: dict[str, LowRank | Full], like: Adapter) -> Adapter:
    """Changes as an adapter that says so, with what `like` says of its base."""
    about = {k: v for k, v in like.metadata.items() if k.startswith("recast.")}
    rank = Adapter(entries, {}).rank
    about["recast.role"] = "full" if rank is None else "delta"
    about.pop("recast.rank", None)
    return Adapter(entries, about | ({} if rank is None else {"recast.rank": str(rank)}))


def apply_patch(
    checkpoint: Checkpoint, patch: Adapter, *, other_base: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a checkpoint with a patch added.

    other_base allows a relative of the checkpoint that the patch was made from: another fine-tune
    of the family is converted roughly. Raises Refused for an adapter that is no change.
    """
    if patch.role not in ("delta", "full"):
        raise Refused(
            f"the adapter is {patch.role}, which is no change of weights; make one from it and "
            "its initial adapter first, with recast extract MODEL --initial … --trained …."
        )
    refuse_residual(checkpoint)
    return changed(checkpoint, None, patch) if other_base else rebuild(checkpoint, None, patch)


def portable(patch: Adapter, checkpoint: Checkpoint, source: str) -> Adapter:
    """A conversion's patch with what it must know to be tried elsewhere: source and fingerprint."""
    found = fingerprint(checkpoint, places(checkpoint, patch.entries).keys())
    return replace(patch, metadata={**patch.metadata, SOURCE: source, PRINT: found.text()})


def read_patch(path: Path) -> Adapter:
    """Read a conversion's patch; raises Refused for any other file."""
    with Checkpoint(path) as file:
        about = file.metadata
        role = about.get("recast.role", "no adapter of Recast")
    if role not in ("delta", "full") or SOURCE not in about or PRINT not in about:
        what = role if role not in ("delta", "full") else "a change that is no conversion's"
        raise Refused(
            f"{path} is no patch ({what}): give the patch.safetensors of a recast convert run."
        )
    return read_adapter(path)


def check_kind(patch: Adapter, checkpoint: Checkpoint, source: str) -> None:
    """Refuse a patch for another family, or for models that predict something else."""
    family, wanted = detect(checkpoint).family, patch.metadata.get("recast.family")
    if family != wanted:
        raise Refused(
            f"the patch is for {wanted} and {checkpoint.path} is {family}: "
            "give a patch of the same family."
        )
    if patch.metadata[SOURCE] != source:
        raise Refused(
            f"the patch turns {patch.metadata[SOURCE]} into {patch.metadata['recast.objective']}, "
            f"and {checkpoint.path} predicts {source}: give a patch made from a model that "
            f"predicts {source}."
        )
    places(checkpoint, patch.entries)


def distance_to_base(patch: Adapter, checkpoint: Checkpoint) -> Distance:
    """How far a checkpoint is from the one that a patch was made from."""
    base = parse_fingerprint(patch.metadata[PRINT])
    absent = [key for key in base.tensors if key not in checkpoint.specs]
    if absent:
        raise Refused(
            f"{checkpoint.path} has no {absent[0]}, which the patch's base had: "
            "give a patch of the same family."
        )
    return distance(base, fingerprint(checkpoint, base.tensors.keys()))


def refuse_far(apart: Distance, checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint that is no relative of a patch's base."""
    if not apart.unet <= FAR or not math.isfinite(apart.patched):
        raise Refused(
            f"the UNet of {checkpoint.path} is {apart.unet:.3f} of its norm away from the model "
            f"that the patch was made from, and {FAR} is the most that is trusted: convert it "
            "without the patch, or give --far."
        )
