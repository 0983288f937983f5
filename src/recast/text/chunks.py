"""Rows of 77 tokens: start, up to 75 of the prompt, end, padding; a long prompt takes several rows.

Words are kept whole as in ComfyUI: one that does not fit moves to the next row, unless it is LONG
tokens or more, which are cut where the row ends.  Padding is 49407 for CLIP-L and 0 for SDXL's
second encoder.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from recast.text.prompt import parse
from recast.text.tokens import END, LENGTH, START, encode

LONG = 8


@dataclass(frozen=True)
class Chunk:
    """One row: ids and weights, both `length` long; the weight of start, end and padding is 1."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def weighted(self) -> bool:
        """True where any token's weight is not 1."""
        return any(w != 1.0 for w in self.weights)


def chunks(prompt: str, *, pad: int = END, length: int = LENGTH) -> list[Chunk]:
    """Return the rows of a prompt, at least one; the empty prompt is one row of padding."""
    room = length - 2
    rows: list[list[tuple[int, float]]] = [[]]
    for word in words(prompt):
        while word:
            free = room - len(rows[-1])
            if len(word) <= free:
                rows[-1] += word
                break
            if len(word) >= min(LONG, room):
                rows[-1] += word[:free]
                word = word[free:]
            rows.append([])
    return [chunk(row, pad, length) for row in rows]


def words(prompt: str) -> list[list[tuple[int, float]]]:
    """Return (id, weight) lists, one for every stretch of text without white space."""
    return [
        [(token, weight) for token in encode(word)]
        for text, weight in parse(prompt)
        for word in text.split()
    ]


def chunk(row: list[tuple[int, float]], pad: int, length: int) -> Chunk:
    """Close one row: start, tokens, end, padding."""
    rest = length - 2 - len(row)
    ids = (START, *(token for token, _ in row), END, *[pad] * rest)
    return Chunk(ids, (1.0, *(weight for _, weight in row), 1.0, *[1.0] * rest))


def repeats(rows: int, others: int) -> int:
    """Return how often `rows` must be repeated to line up with `others`.

    A context repeated whole leaves attention as it is (softmax over copies is the same average),
    where padding with an empty row would change the picture of the shorter prompt.
    """
    return math.lcm(rows, others) // rows
