"""Which directions of all modules fit into a file of a given size."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence

from torch import Tensor

from recast.adapter.file import low_rank_specs
from recast.errors import Refused
from recast.header import header_bytes, place
from recast.surgery.pieces import Piece
from recast.surgery.scores import foremost, leading

MIB = 1 << 20
FIELDS = 4096  # bytes that hashes and dimensions take in a header
LONGER = 2  # how much longer names and configurations of PEFT and diffusers are, at most


def within_size(
    found: Sequence[Piece],
    orders: Sequence[Tensor],
    size: float,
    dtype: str | None,
    form: str,
    metadata: Mapping[str, str],
    extra: int,
) -> list[Tensor]:
    """Indices kept of each piece: as many of the best as a file of `size` MiB holds.

    orders: what directions are sorted by, best first. extra: bytes of what is written anyway. A
    file grows with every direction, so their number is found by bisection.
    """
    best, lengths = foremost(orders), [len(order) for order in orders]
    text = sum(len(json.dumps(part)) for pair in metadata.items() for part in pair)
    room = size * MIB - extra - text - FIELDS

    def fits(count: int) -> bool:
        return _file_size(found, leading(best, count, lengths), dtype, form) <= room

    counts = range(1, len(best) + 1)
    count = bisect_left(counts, True, key=lambda count: not fits(count))
    if not count:
        raise Refused(
            f"size={size:g}: not one direction fits beside {extra + text + FIELDS:,} bytes of "
            "norms, biases and metadata; allow more."
        )
    return leading(best, count, lengths)


def _file_size(
    found: Sequence[Piece], kept: Sequence[Tensor], dtype: str | None, form: str
) -> float:
    """Bytes of factors and their header; with the zero out_proj's that text encoders get."""
    specs: dict[str, tuple[str, tuple[int, ...]]] = {}
    held = {p.lora: (p, len(k)) for p, k in zip(found, kept, strict=True) if len(k)}
    for lora, (piece, rank) in held.items():
        specs |= low_rank_specs(lora, piece.shape, rank, dtype or piece.dtype)
        head, middle, _ = lora.rpartition("_self_attn_")
        if middle and f"{head}{middle}out_proj" not in held:
            square = (piece.shape[0], piece.shape[0])
            specs |= low_rank_specs(f"{head}{middle}out_proj", square, rank, dtype or piece.dtype)
    placed = place(specs)
    header = len(header_bytes(placed, {})) * (1 if form == "kohya" else LONGER)
    return header + sum(spec.nbytes for spec in placed.values())
