"""Factors of an adapter file as they are, with their alphas and dtypes: what export moves about."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from recast.adapter.file import DTYPES, zero_out_proj
from recast.adapter.formats import Raw, plain_factors
from recast.lowrank import LowRank


@dataclass(frozen=True)
class Pair:
    """Factors of one module as a file holds them: up (O, r), down (r, I[, kh, kw])."""

    up: Tensor
    down: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def scaled(self, alpha: float) -> Pair:
        """The same change with another alpha, rounded to the factors' dtype."""
        if alpha == self.alpha:
            return self
        return replace(self, up=(self.up.float() * (self.alpha / alpha)).to(self.up.dtype),
                       alpha=alpha)  # fmt: skip

    def stronger(self, weight: float) -> Pair:
        """The change times a weight, rounded to the factors' dtype."""
        if weight == 1:
            return self
        return replace(self, up=(self.up.double() * weight).to(self.up.dtype))

    def raised(self) -> Tensor:
        """`up` with the trailing 1x1 kernel that convolutions have."""
        return self.up.reshape(*self.up.shape, *(1,) * (self.down.ndim - 2))


def taken(path: Path, raw: Raw, dtype: str | None) -> tuple[dict[str, Pair], dict[str, Tensor]]:
    """The factors by module, and everything else by `module.suffix`."""
    pairs: dict[str, Pair] = {}
    full: dict[str, Tensor] = {}
    for lora, tensors in raw.modules.items():
        if "lora_up.weight" in tensors:
            up, down = plain_factors(path, lora, tensors)
            wanted = DTYPES[dtype] if dtype else tensors["lora_down.weight"].dtype
            rank = float(down.shape[0])
            alpha = tensors["alpha"].double().item() if "alpha" in tensors else rank
            pairs[lora] = Pair(up.to(wanted), down.to(wanted), alpha)
        for suffix in filter(tensors.__contains__, ("diff", "diff_b", "w_norm", "b_norm")):
            tensor = tensors[suffix]
            full[f"{lora}.{suffix}"] = tensor.to(DTYPES[dtype]) if dtype else tensor
    return pairs, full


def one_alpha(pairs: Mapping[str, Pair], metadata: Mapping[str, str]) -> float:
    """The file's alpha: the one it has, or had, or else the commonest rank."""
    alphas = {pair.alpha for pair in pairs.values()}
    if "recast.alpha" in metadata:
        return float(metadata["recast.alpha"])
    if len(alphas) == 1:
        return alphas.pop()
    return float(commonest(pair.rank for pair in pairs.values())) if pairs else 1.0


def commonest(numbers: Iterable[Any]) -> Any:
    """The number that occurs most often, of several the largest."""
    counts = Counter(numbers)
    return max(counts, key=lambda number: (counts[number], number))


def zero_pairs(pairs: Mapping[str, Pair]) -> dict[str, Pair]:
    """Zero factors of each missing out_proj beside a text encoder's q, k or v."""
    factors = {f"{lora}.weight": LowRank(p.up, p.down) for lora, p in pairs.items()}
    alpha = {p.rank: p.alpha for p in pairs.values()}
    found: dict[str, Pair] = {}
    for name, zero in zero_out_proj(factors).items():
        assert isinstance(zero, LowRank)
        found[name.removesuffix(".weight")] = Pair(zero.up, zero.down, alpha[zero.rank])
    return found


def padded_pairs(pairs: Mapping[str, Pair]) -> dict[str, Pair]:
    """All filled up to the largest rank with zeros, with their alphas and meaning."""
    rank = max((pair.rank for pair in pairs.values()), default=0)
    found = {}
    for lora, pair in pairs.items():
        same = pair.scaled(pair.alpha * pair.rank / rank)  # the scale alpha / r must stay
        up = same.up.new_zeros(len(same.up), rank)
        down = same.down.new_zeros(rank, *same.down.shape[1:])
        up[:, : pair.rank], down[: pair.rank] = same.up, same.down
        found[lora] = Pair(up, down, pair.alpha)
    return found
