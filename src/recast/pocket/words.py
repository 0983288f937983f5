"""The captions' words as CLIP tokens: the rows of the vocabulary that the pocket world uses.

Teachers are trained on these rows alone; all others of the 49,408 are written as zeros.  Token 0 is
"!", with which SDXL's second text encoder pads.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from recast.pocket.world import ATTRIBUTES
from recast.text.tokens import END, LENGTH, START, encode

VOCABULARY, BANG = 49408, 0


@cache
def kept() -> Tensor:
    """Return the sorted ids that captions, start, end and padding use, (K,)."""
    words = [word for names in ATTRIBUTES.values() for word in names]
    ids = {BANG, START, END, *encode(" ".join(["a on at", *words]))}
    return torch.tensor(sorted(ids))


def tokens(captions: Sequence[str], length: int = LENGTH, pad: int = END) -> Tensor:
    """Return ids (B, length): start, caption, end, padding; "" is start and end alone."""
    rows = torch.full((len(captions), length), pad)
    for row, text in zip(rows, captions, strict=True):
        ids = [START, *_encoded(text), END]
        row[: len(ids)] = torch.tensor(ids)
    return rows


_encoded = cache(encode)


def compact(ids: Tensor) -> Tensor:
    """Return each id's index among the kept ones."""
    return torch.searchsorted(kept(), ids)


def scatter(rows: Tensor) -> Tensor:
    """Return the whole embedding table (49408, width) of the kept rows (K, width)."""
    table = torch.zeros(VOCABULARY, rows.shape[1], dtype=rows.dtype)
    table[kept()] = rows
    return table
