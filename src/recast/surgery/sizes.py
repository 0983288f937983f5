"""Which directions of all modules fit into a file of a given size."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from torch import Tensor

from recast.adapter.file import low_rank_specs
from recast.errors import Refused
from recast.header import DTYPES, header_bytes, place
from recast.surgery.pieces import Piece
from recast.surgery.scores import within

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
    """Indices kept of each piece, so that a file of the form has at most `size` MiB.

    orders: what directions are sorted by. extra: bytes of what is written anyway. Each round takes
    off what the header of the round before was too much.
    """
    costs = [piece.numbers * DTYPES[dtype or piece.dtype][0] for piece in found]
    limit = size * MIB
    text = sum(len(json.dumps(part)) for pair in metadata.items() for part in pair)
    budget = limit - extra - text - FIELDS
    while budget > 0:
        kept, _ = within(orders, costs, budget)
        over = _file_size(found, kept, dtype, form) + extra + text + FIELDS - limit
        if over <= 0:
            return kept
        budget -= over
    raise Refused(
        f"size={size:g}: {extra + text + FIELDS:,} bytes are norms, biases and metadata, so no "
        "direction fits; allow more."
    )


def _file_size(
    found: Sequence[Piece], kept: Sequence[Tensor], dtype: str | None, form: str
) -> float:
    specs: dict[str, tuple[str, tuple[int, ...]]] = {}
    for piece, indices in zip(found, kept, strict=True):
        if len(indices):
            specs |= low_rank_specs(piece.lora, piece.shape, len(indices), dtype or piece.dtype)
    placed = place(specs)
    header = len(header_bytes(placed, {})) * (1 if form == "kohya" else LONGER)
    return header + sum(spec.nbytes for spec in placed.values())
