r"""Weights inside a prompt, read as ComfyUI reads them, and `[word]` as AUTOMATIC1111 does.

    (word:1.2)  weight 1.2     (word)  x 1.1     [word]  / 1.1     \( \) \[ \]  the character

A number replaces the weight around it, a bare bracket multiplies it: in `(a (b) (c:1.3):0.5)` a
weighs 0.5, b 0.55, c 1.3.  Brackets without a partner are text.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

NUMBER = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*")
PARTNER = {")": "(", "]": "["}
FACTOR = {"(": 1.1, "[": 1 / 1.1}


@dataclass(frozen=True)
class Piece:
    """A stretch of text; `fixed` when a number set its weight, `inner` when it left a bracket."""

    text: str
    weight: float = 1.0
    fixed: bool = False
    inner: bool = False


def parse(prompt: str) -> list[tuple[str, float]]:
    """Return (text, weight) pairs in order; neighbours of one weight are joined."""
    levels: list[tuple[str, list[Piece]]] = [("", [])]
    for symbol in re.findall(r"\\[()\[\]]|[()\[\]]|\\|[^()\[\]\\]+", prompt):
        if symbol in ("(", "["):
            levels.append((symbol, []))
        elif symbol in PARTNER and levels[-1][0] == PARTNER[symbol]:
            opening, inner = levels.pop()
            levels[-1][1].extend(close(opening, inner))
        else:
            literal = symbol[1:] if len(symbol) == 2 and symbol[0] == "\\" else symbol
            levels[-1][1].append(Piece(literal))
    pieces = list(levels[0][1])
    for opening, inner in levels[1:]:
        pieces += [Piece(opening), *inner]
    return joined(pieces)


def close(opening: str, inner: list[Piece]) -> list[Piece]:
    """Apply a finished bracket to the pieces inside it: its number, or its factor."""
    number, inner = trailing_number(inner) if opening == "(" else (None, inner)
    fixed, factor = (False, FACTOR[opening]) if number is None else (True, number)
    return [
        p if p.fixed else replace(p, weight=p.weight * factor, fixed=fixed, inner=True)
        for p in inner
    ]


def trailing_number(inner: list[Piece]) -> tuple[float | None, list[Piece]]:
    """Split `:1.2` off the end of a bracket's content; None where there is no finite number."""
    last = inner[-1] if inner else Piece("")
    head, colon, tail = last.text.rpartition(":")
    match = NUMBER.fullmatch(tail)
    if last.inner or not colon or match is None or not (head or inner[:-1]):
        return None, inner
    number = float(match[1])
    if not math.isfinite(number):
        return None, inner
    return number, [*inner[:-1], replace(last, text=head)]


def joined(pieces: list[Piece]) -> list[tuple[str, float]]:
    """Join neighbours of one weight and drop empty texts."""
    pairs: list[tuple[str, float]] = []
    for piece in pieces:
        if not piece.text:
            continue
        if pairs and pairs[-1][1] == piece.weight:
            pairs[-1] = (pairs[-1][0] + piece.text, piece.weight)
        else:
            pairs.append((piece.text, piece.weight))
    return pairs
