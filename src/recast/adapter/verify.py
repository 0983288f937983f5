"""Proof on the level of weights: do these files add up to that checkpoint?

    split:   R + B A   against W           rebuild:   file   against   W + (T - T0)

Every tensor is compared: largest and relative (Frobenius) error, and the share of entries that have
the same bits after rounding to the dtype of the original. The sign of a zero does not survive a sum
and is not compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from recast.adapter.file import Adapter
from recast.adapter.places import places, refuse_partial, refuse_residual, widened
from recast.adapter.rebuild import rebuild, refuse_other_base
from recast.checkpoint import Checkpoint
from recast.errors import Refused
from recast.lowrank import Full, LowRank
from recast.markers import strip

TOLERANCES = {"F32": 1e-6, "F16": 3e-4, "BF16": 3e-3}
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
PART = 1 << 14  # numbers that are compared at once: torch takes no second thread for so few


@dataclass(frozen=True)
class TensorError:
    """One tensor against what it should be."""

    key: str
    largest: float
    relative: float
    exact: float


@dataclass(frozen=True)
class Verdict:
    """All tensors against what they should be, and the bound on their relative error."""

    tensors: tuple[TensorError, ...]
    relative: float
    exact: float
    tolerance: float
    missing: tuple[str, ...]
    surplus: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """No tensor lacks or is too many, and none is off by more than the tolerance."""
        return not self.missing and not self.surplus and self.worst.relative <= self.tolerance

    @property
    def worst(self) -> TensorError:
        """The tensor with the largest relative error (NaN counts as the largest)."""
        return max(self.tensors, key=lambda t: t.relative if t.relative == t.relative else 1e300)


def verify_split(
    original: Checkpoint,
    residual: Checkpoint,
    adapter: Adapter,
    *,
    tolerance: float | None = None,
) -> Verdict:
    """Compare residual + adapter with the original.

    tolerance None follows the coarsest dtype of the changed residual tensors: 3e-4 for fp16, 3e-3
    for bf16, 1e-6 for fp32. Raises Refused where the three files do not belong together, by their
    hashes.
    """
    if residual.metadata.get("recast.role") != "residual":
        raise Refused(f"{residual.path} is no residual; give the residual.safetensors of a split.")
    if residual.metadata.get("recast.base_sha256") != original.sha256():
        raise Refused(
            f"{residual.path} was split from another checkpoint than {original.path}; "
            "give the original of this residual."
        )
    refuse_other_base(original, adapter)
    partner = adapter.metadata.get("recast.residual_sha256")
    if partner is not None and partner != residual.sha256():
        raise Refused(
            f"the adapter belongs to the residual with sha256 {partner[:12]}, not to "
            f"{residual.path}; give the two files of one split."
        )
    refuse_partial(residual, adapter.entries)
    where = places(residual, adapter.entries)
    if tolerance is None:
        tolerance = max(TOLERANCES.get(residual.specs[key].dtype, 3e-3) for key in where)

    def pairs() -> Iterator[tuple[str, Tensor, Tensor]]:
        for key in _common(original, residual):
            got = residual[key]
            if key in where:
                got = widened(got)
                for place in where[key]:
                    _add(place.view(got), adapter.entries[place.name])
            yield key, original[key], got
            del got  # before the next is read

    return _verdict(original, residual, pairs(), tolerance)


def verify_rebuilt(
    original: Checkpoint,
    rebuilt: Checkpoint,
    initial: Adapter | None = None,
    trained: Adapter | None = None,
    *,
    tolerance: float = 0.0,
) -> Verdict:
    """Compare a written checkpoint with the original plus its adapter, or with the original alone.

    Marker tensors of the objective are left out. Raises Refused for a residual in either place.
    """
    for checkpoint in (original, rebuilt):
        refuse_residual(checkpoint)
    expected: Iterator[tuple[str, Tensor]]
    if trained is None:
        expected = ((key, original[key]) for key in original.specs)
    else:
        expected = rebuild(original, initial, trained)
    both = set(_common(original, rebuilt))
    pairs = ((key, want, rebuilt[key]) for key, want in expected if key in both)
    return _verdict(original, rebuilt, pairs, tolerance)


def _common(original: Checkpoint, other: Checkpoint) -> list[str]:
    specs = other.specs
    kept = strip(original.specs)
    return [key for key in kept if key in specs and specs[key].shape == original.specs[key].shape]


def _verdict(
    original: Checkpoint,
    other: Checkpoint,
    pairs: Iterator[tuple[str, Tensor, Tensor]],
    tolerance: float,
) -> Verdict:
    errors: list[TensorError] = []
    off = whole = same = count = 0.0
    for key, want, got in pairs:
        error, square, norm = _compared(key, want, got)
        errors.append(error)
        off, whole = off + square, whole + norm
        same, count = same + error.exact * want.numel(), count + want.numel()
        del want, got  # before the next are made
    both = {error.key for error in errors}
    return Verdict(
        tuple(errors),
        (off / whole) ** 0.5 if whole else 0.0,
        same / count if count else 1.0,
        tolerance,
        tuple(key for key in strip(original.specs) if key not in both),
        tuple(key for key in strip(other.specs) if key not in both),
    )


def _compared(key: str, want: Tensor, got: Tensor) -> tuple[TensorError, float, float]:
    """One tensor's error, and the squared norms of its gap and of what it should be.

    In fp64 and in parts, so that nothing of the tensor's size is made.
    """
    largest = square = norm = same = 0.0
    parts = zip(want.reshape(-1).split(PART), got.reshape(-1).split(PART), strict=True)
    for should, is_ in parts:
        if not should.numel():
            continue
        wide, exact = should.double(), is_.to(should.dtype)
        gap = is_.double() - wide
        low, high = gap.aminmax()
        largest = max(largest, -low.item(), high.item(), key=_or_infinity)
        square, norm = square + _norm(gap) ** 2, norm + _norm(wide) ** 2
        same += _same(exact, should)
    relative = (square / norm) ** 0.5 if norm else (float("inf") if square else 0.0)
    share = same / want.numel() if want.numel() else 1.0
    return TensorError(key, largest, relative, share), square, norm


def _norm(part: Tensor) -> float:
    return torch.linalg.vector_norm(part).item()  # dot takes as many threads as there are


def _same(a: Tensor, b: Tensor) -> int:
    """How many entries have the same bits, or are both a zero."""
    kind = INTEGERS[a.element_size()]
    x, y = a.view(kind), b.view(kind)
    alike = x == y
    if a.is_floating_point():
        alike |= ((x | y) << 1) == 0  # nothing but signs
    return int(alike.count_nonzero().item())


def _or_infinity(value: float) -> float:
    return float("inf") if math.isnan(value) else value


def _add(weight: Tensor, entry: LowRank | Full) -> None:
    """Add an entry to an fp32 weight; a product is added as it is formed."""
    if isinstance(entry, Full):
        weight.add_(entry.dense())
        return
    up, down = entry.up.to(weight.dtype), entry.down.to(weight.dtype).flatten(1)
    weight.view(len(weight), -1).addmm_(up, down)
