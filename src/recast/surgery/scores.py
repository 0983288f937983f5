"""Score recipes: which directions are worth keeping, compared over all modules of a file.

    score_i = log10(S_i rescale) - sum over the terms of  weight log10(term)

    fro_ckpt   |W|, Frobenius, of the checkpoint's weight       fro_lora   |S|
    spn_ckpt   sigma_1(W)                                       spn_lora   S_1
    subspace   |u_i^T W v_i|                                    params     O + I kh kw

Weights are divided by their sum; a bare name counts 1. Kept is what scores `thr` or more, or, with
`size`, the best scores that fit into a file of so many MiB. Grammar and scores are those of
elias-gaeros' resize_lora. Recast's own is the word `per_byte`: with `size`, directions are taken by
10^(2 score) / bytes, the squared change that a byte buys, where a score alone prefers wide layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recast.errors import Refused

TERMS = ("spn_lora", "spn_ckpt", "subspace", "fro_lora", "fro_ckpt", "params")
OF_BASE = ("spn_ckpt", "subspace", "fro_ckpt")


@dataclass(frozen=True)
class Recipe:
    """Weights of the terms, which sum to 1, and one of thr and size (MiB); size comes first."""

    text: str
    weights: Mapping[str, float]
    thr: float | None = None
    size: float | None = None
    rescale: float = 1.0
    per_byte: bool = False

    def uses(self, *terms: str) -> bool:
        """Whether any of the terms counts."""
        return any(abs(self.weights.get(term, 0.0)) > 1e-6 for term in terms)

    def score(self, singular: Tensor, facts: Mapping[str, float], overlap: Tensor | None) -> Tensor:
        """Scores of a module's directions; facts: fro_ckpt, spn_ckpt and params where they count.

        A direction with an overlap of exactly 0 has an infinite score, as has one in a layer of
        norm 0: there is nothing that it could be small against.
        """
        terms = dict(facts)
        if len(singular):
            terms |= {"spn_lora": float(singular[0]), "fro_lora": float(singular.norm())}
        found = torch.log10(singular) + math.log10(self.rescale)
        for term, weight in self.weights.items():
            if not self.uses(term) or term == "subspace":
                continue
            found = found - weight * torch.tensor(terms[term], dtype=found.dtype).log10()
        if overlap is not None:
            found = found - self.weights["subspace"] * torch.log10(overlap)
        return found

    def rank_by(self, scores: Tensor, numbers: int) -> Tensor:
        """What `size` sorts a module's directions by; numbers: stored for each of them."""
        return 2 * scores - math.log10(numbers) if self.per_byte else scores


def recipes(text: str) -> list[Recipe]:
    """Recipes separated by colons. Raises Refused for what does not parse."""
    return [_recipe(one.strip()) for one in text.split(":")]


def _recipe(text: str) -> Recipe:
    weights = dict.fromkeys(TERMS, 0.0)
    others: dict[str, float] = {}
    per_byte = False
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if key == "per_byte" and not equals:
            per_byte = True
        elif key in TERMS:
            weights[key] = _number(text, key, value) if equals else 1.0
        elif key in ("thr", "size", "rescale"):
            others[key] = _number(text, key, value)
        else:
            known = ", ".join((*TERMS, "thr", "size", "rescale", "per_byte"))
            raise Refused(f"recipe {text!r} has {key!r}; it may hold {known}.")
    total = sum(weights.values())
    if not any(weights.values()) or total == 0:
        raise Refused(f"recipe {text!r} has no score: add one of {', '.join(TERMS)}.")
    if not others.keys() & {"thr", "size"}:
        raise Refused(f"recipe {text!r} does not say how much to keep: add thr=-3.5 or size=50.")
    if others.get("size", 1.0) <= 0 or others.get("rescale", 1.0) <= 0:
        raise Refused(f"recipe {text!r}: size and rescale are more than 0.")
    if per_byte and "size" not in others:
        raise Refused(f"recipe {text!r}: per_byte is about size; add size=50.")
    shares = {term: weight / total for term, weight in weights.items()}
    return Recipe(
        text, shares, others.get("thr"), others.get("size"), others.get("rescale", 1.0), per_byte
    )


def _number(text: str, key: str, value: str) -> float:
    try:
        found = float(value)
    except ValueError as error:
        raise Refused(f"recipe {text!r}: {key}={value} is no number.") from error
    if not math.isfinite(found):
        raise Refused(f"recipe {text!r}: {key}={value} is no finite number.")
    return found


def foremost(orders: Sequence[Tensor]) -> Tensor:
    """Places in the concatenation of all modules' directions, best first, equals as they come."""
    return torch.cat(list(orders)).double().argsort(descending=True, stable=True)


def leading(best: Tensor, count: int, lengths: Sequence[int]) -> list[Tensor]:
    """Indices of each module's directions that are among the first `count` of all."""
    taken = torch.zeros(len(best), dtype=torch.bool)
    taken[best[:count]] = True
    return [part.nonzero().flatten() for part in taken.split(list(lengths))]
