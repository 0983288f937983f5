"""Weighted sums of changes of one module, exact in fp64 until they are rounded for a file, once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from recast.adapter.file import DTYPES
from recast.adapter.formats import Tensors
from recast.adapter.pairs import Pair
from recast.errors import Refused
from recast.surgery.pieces import Piece
from recast.surgery.rules import Cut
from recast.surgery.thin import core

SMALL = ("F16", "BF16")


@dataclass(frozen=True)
class Term:
    """One adapter's change of a module, times w: a piece, or a norm's or bias' full change."""

    piece: Piece | None
    weight: float
    full: Tensor | None = None

    @property
    def scale(self) -> float:
        """What the factors' product is multiplied with; their tensors are not read."""
        assert self.piece is not None
        tensors = self.piece.tensors
        if self.piece.full or "alpha" not in tensors:
            return self.weight
        return tensors["alpha"].double().item() / self.rank * self.weight

    @property
    def rank(self) -> int:
        """Rank of the factors."""
        assert self.piece is not None
        if self.piece.full:
            return self.piece.short
        tensors = self.piece.tensors
        assert isinstance(tensors, Tensors)
        return tensors.spec("lora_down.weight").shape[0]

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """up, down, and the number that the product is multiplied with."""
        assert self.piece is not None
        up, down, scale = self.piece.factors()
        return up, down, scale * self.weight

    def dense(self) -> Tensor:
        """The change in fp64, with the weight."""
        if self.full is not None:
            return self.full.double() * self.weight
        assert self.piece is not None
        if self.piece.full:
            return self.piece.delta().double() * self.weight
        up, down, scale = self.factors()
        return (up.double() @ down.double().flatten(1) * scale).reshape(self.piece.shape)


def suffixed(loose: Mapping[str, list[Term]]) -> Iterator[tuple[str, list[Term]]]:
    """Norms' and biases' changes under the suffix that every reader knows."""
    for name, mine in loose.items():
        lora, _, param = name.rpartition(".")
        yield f"{lora}.{'diff' if param == 'weight' else 'diff_b'}", mine


def summed(name: str, mine: Sequence[Term], dtype: str | None) -> Tensor:
    """A sum of full changes, rounded once to a dtype (None: the first one's)."""
    total = mine[0].dense()
    for term in mine[1:]:
        total = total + term.dense().reshape(total.shape)
    first = mine[0].full
    form = DTYPES[dtype] if dtype else torch.float32 if first is None else first.dtype
    result = total.to(form)
    refuse_unsound(result, name)
    return result


def factors(mine: Sequence[Term], cut: Cut | None, name: str) -> tuple[Tensor, Tensor] | None:
    """up (O, r) and down (r, I[, kh, kw]) of the sum in fp64; None where nothing is left."""
    ups, downs = [], []
    for term in mine:
        up, down, scale = term.factors()
        ups.append(up.double() * scale)
        downs.append(down.double())
    tail = max((down.shape[1:] for down in downs), key=len)
    up, down = torch.cat(ups, 1), torch.cat([d.reshape(len(d), *tail) for d in downs])
    refuse_unsound(up, name)
    if cut is None:
        return up, down
    found = core(up, down, name=name)
    shape = (len(up), *tail)
    short = min(shape[0], prod(tail))
    count = cut.kept(found.singular, short, conv=prod(tail[1:]) > 1)
    if not count:
        return None
    small = found.factors(up, down, torch.arange(count))
    return small.up, small.down


def rounded(up: Tensor, down: Tensor, alpha: float, dtype: str, name: str) -> Pair:
    """Factors of `up @ down` as a file with this alpha holds them.

    r / alpha goes into the factor that rounds less: fp16's smallest numbers lose bits.
    """
    number, form = len(down) / alpha, DTYPES[dtype]
    choices = []
    for factors in ((up * number, down), (up, down * number)):
        made = [factor.to(form) for factor in factors]
        gaps = [(m.double() - f).norm() / f.norm().clamp_min(1e-300)
                for m, f in zip(made, factors, strict=True)]  # fmt: skip
        choices.append((float(sum(gaps)), made))
    made = min(choices, key=lambda choice: choice[0])[1]
    for factor in made:
        refuse_unsound(factor, name)
    return Pair(made[0], made[1], alpha)


def refuse_unsound(tensor: Tensor, name: str) -> None:
    if not torch.isfinite(tensor).all():
        raise Refused(
            f"{name} holds NaN or infinity, or leaves the range of its dtype; give smaller "
            "weights, or --dtype fp32."
        )


def widest(dtypes: Iterable[str]) -> str:
    """The one dtype of all, or fp32."""
    found = set(dtypes)
    return found.pop() if len(found) == 1 and found <= {*SMALL, "F32"} else "F32"
