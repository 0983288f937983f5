"""A whole checkpoint again, from the original and what was trained.

    W' = W + (T - T0)        summed in fp32, rounded once to the dtype of W

T0 is the initial adapter and T the trained one; for a full entry T - T0 is its delta. Tensors
without a change are copied as bytes, so an untrained adapter gives the original back, byte for
byte.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from recast.adapter.file import Adapter
from recast.adapter.places import Place, places, refuse_residual, widened
from recast.checkpoint import Checkpoint, write
from recast.errors import CheckFailed, Refused
from recast.lowrank import Full, LowRank, difference
from recast.markers import marker_specs, stamp, strip

# what an adapter keeps of its making while it is trained
ORIGIN = ("recast.base_sha256", "recast.residual_sha256", "recast.method", "recast.rank_rule")
CONTENT_HASHES = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")


def rebuild(
    checkpoint: Checkpoint, initial: Adapter | None, trained: Adapter
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the checkpoint in file order, changed where the adapter changed.

    initial may be None where `trained` is itself a change (role `delta` or `full`). Raises Refused
    for an adapter of another base, a missing initial one or a residual in place of the original.
    """
    refuse_residual(checkpoint)
    check_pair(initial, trained)
    for adapter in (initial, trained):
        if adapter is not None:
            refuse_other_base(checkpoint, adapter)
    yield from changed(checkpoint, initial, trained)


def changed(
    checkpoint: Checkpoint, initial: Adapter | None, trained: Adapter
) -> Iterator[tuple[str, Tensor]]:
    """As rebuild, whatever checkpoint the adapter was made for."""
    where = places(checkpoint, trained.entries)
    for key in checkpoint.specs:
        tensor = checkpoint[key]
        if key in where:
            tensor = _added(tensor, key, where[key], initial, trained)
        yield key, tensor
        del tensor  # before the next is read


def write_rebuilt(
    checkpoint: Checkpoint,
    initial: Adapter | None,
    trained: Adapter,
    out: Path,
    *,
    objective: str | None = None,
    metadata: Mapping[str, str] | None = None,
    force: bool = False,
) -> str:
    """Stream the rebuilt checkpoint to a file and return its sha256.

    objective None keeps the original's markers; a name strips them and sets its own.
    """
    tensors = rebuild(checkpoint, initial, trained)
    return write_changed(checkpoint, trained, tensors, out, objective, metadata, force)


def write_changed(
    checkpoint: Checkpoint,
    trained: Adapter,
    tensors: Iterator[tuple[str, Tensor]],
    out: Path,
    objective: str | None,
    metadata: Mapping[str, str] | None,
    force: bool,
) -> str:
    """Write tensors that have the names and shapes of a checkpoint, with markers and provenance."""
    specs = {key: (spec.dtype, spec.shape) for key, spec in checkpoint.specs.items()}
    header = {**checkpoint.metadata, **parents(checkpoint, trained), **(metadata or {})}
    if objective is None:
        kept_header = {k: v for k, v in header.items() if k not in CONTENT_HASHES}
        return write(out, specs, tensors, kept_header, force=force, sources=checkpoint.files)
    kept = {key: specs[key] for key in strip(specs)}
    marks = marker_specs(objective)
    return write(
        out,
        {**marks, **kept},
        _marked(tensors, kept, marks),
        stamp(header, objective),
        force=force,
        sources=checkpoint.files,
    )


def parents(checkpoint: Checkpoint, trained: Adapter) -> dict[str, str]:
    """Where a written file comes from: hashes of its parents, in `recast.*` fields."""
    return {
        "recast.role": "checkpoint",
        "recast.base_sha256": checkpoint.sha256(),
        "recast.adapter_role": trained.role,
    }


def check_pair(initial: Adapter | None, trained: Adapter) -> None:
    """Refuse a trained adapter without its start, and two that do not belong together."""
    if initial is None:
        if trained.role.startswith("pissa"):
            raise Refused(
                f"the adapter is {trained.role}: it holds principal parts of the weights "
                "and means nothing without its initial adapter; name that with --initial "
                "(recast extract MODEL --initial … --trained … makes a change of the two)."
            )
        return
    if initial.role == "pissa-trained":
        raise Refused(
            "the initial adapter is pissa-trained, so it is no start; give the adapter "
            "that split or train wrote first."
        )
    odd = sorted(initial.entries.keys() ^ trained.entries.keys())
    if odd:
        raise Refused(
            f"{len(odd)} entries are in only one of the initial and trained adapters, "
            f"first {', '.join(odd[:5])}; give two adapters of one run."
        )
    for key in ORIGIN:
        began, kept = initial.metadata.get(key), trained.metadata.get(key)
        if began is not None and kept is not None and began != kept:
            raise Refused(
                f"the trained adapter began with another initial one ({key} is {kept[:12]}, not "
                f"{began[:12]}); give two adapters of one run."
            )
    for name, entry in trained.entries.items():
        start = initial.entries[name]
        if type(start) is not type(entry) or start.shape != entry.shape:
            raise Refused(
                f"{name} differs in kind or shape between the initial and the trained "
                "adapter; give two adapters of one run."
            )
        if isinstance(start, Full) and start.delta.count_nonzero():
            raise Refused(
                f"the initial adapter already changes {name}; it is no start, so leave it out, or "
                "give the adapter that training began with."
            )


def refuse_other_base(checkpoint: Checkpoint, adapter: Adapter) -> None:
    """Refuse an adapter whose header names another checkpoint."""
    if adapter.base is not None and adapter.base != checkpoint.sha256():
        raise Refused(
            f"the {adapter.role} adapter belongs to the checkpoint with sha256 "
            f"{adapter.base[:12]}, and {checkpoint.path} is {checkpoint.sha256()[:12]}; "
            "give the checkpoint it was made from."
        )


def change(initial: LowRank | Full | None, trained: LowRank | Full) -> LowRank | Full:
    """trained - initial, exactly zero where nothing moved; a full entry is a change itself."""
    if isinstance(trained, LowRank) and isinstance(initial, LowRank):
        return difference(trained, initial)
    return trained


def _added(
    weight: Tensor, key: str, at: list[Place], initial: Adapter | None, trained: Adapter
) -> Tensor:
    total: Tensor | None = None
    sound = True
    for place in at:
        start = None if initial is None else initial.entries[place.name]
        delta = change(start, trained.entries[place.name]).dense()
        if delta.count_nonzero():
            if total is None:
                sound = _finite(weight)  # asked now: an fp32 weight is changed in place
                total = widened(weight)
            place.view(total).add_(delta)
        del delta
    if total is None:
        return weight
    result = total.to(weight.dtype)
    if sound and not _finite(result):
        raise CheckFailed(
            f"{key} leaves the range of {weight.dtype} when the change is added; "
            "train with a smaller step, or store the original in bf16 or fp32."
        )
    return result


def _finite(tensor: Tensor) -> bool:
    """Whether every number is finite; unlike torch.isfinite, no tensor is made to find out."""
    if not tensor.numel():
        return True
    wide = tensor.float() if tensor.itemsize == 1 else tensor  # fp8 has no aminmax
    return all(math.isfinite(end.item()) for end in wide.aminmax())


def _marked(
    tensors: Iterator[tuple[str, Tensor]],
    kept: Mapping[str, object],
    marks: Mapping[str, tuple[str, tuple[int, ...]]],
) -> Iterator[tuple[str, Tensor]]:
    # empty and first, where they disturb no other tensor's alignment
    yield from ((key, torch.zeros(shape)) for key, (_, shape) in marks.items())
    for key, tensor in tensors:
        if key in kept:
            yield key, tensor
        del tensor
