"""Which singular values of one module are kept: rules that look at that module alone.

    rank         the r largest
    ratio p      S_i > S_1 / p
    cumulative p the fewest with  sum S   >= p   of all
    fro p        the fewest with  sum S^2 >= p^2 of all

The last three are sd-scripts' sv_ratio, sv_cumulative and sv_fro. Its `resize_lora.py` adds one to
a count that is one already; `like_kohya` does so too, and then clamps as it does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recast.errors import Refused

RULES = ("sv_ratio", "sv_cumulative", "sv_fro")
ZERO = 1e-6  # the first singular value up to which sd-scripts takes a module for empty


@dataclass(frozen=True)
class Cut:
    """A rule for every module: of RULES, or "" for a rank alone; most and most_conv cap it.

    most_conv is for kernels larger than 1x1, as kohya's conv_dim is.
    """

    rule: str = ""
    value: float = 0.0
    most: int | None = None
    most_conv: int | None = None
    like_kohya: bool = False

    def cap(self, *, conv: bool) -> int | None:
        """The largest rank of a module."""
        return self.most if not conv or self.most_conv is None else self.most_conv

    def kept(self, singular: Tensor, short: int, *, conv: bool) -> int:
        """How many of a module's singular values stay; short: the short side of its weight."""
        most, have = self.cap(conv=conv), len(singular)
        found = have if not self.rule else COUNTS[self.rule](singular, self.value)
        if self.like_kohya and self.rule:
            found = max(1, min(found, short - 1)) + 1
        if self.like_kohya and (not have or singular[0] <= ZERO):
            found = 1
        found = found if most is None else min(found, most)
        return min(found, have)


def cut(rank: int | None, conv_rank: int | None, rule: str | None, like_kohya: bool = False) -> Cut:
    """A rule from the command line's texts, such as sv_fro=0.9.

    Raises Refused for what is none, and for ranks below 1.
    """
    for option, given in (("--rank", rank), ("--conv-rank", conv_rank)):
        if given is not None and given < 1:
            raise Refused(
                f"{option} {given}: nothing would be left of a module; give a rank of at least 1."
            )
    if rule is None:
        if rank is None:
            raise Refused("say how small: give --rank, --rule or --recipe.")
        if like_kohya:
            raise Refused("--like-kohya is about --rule: a fixed rank is the same in both.")
        return Cut(most=rank, most_conv=conv_rank)
    name, _, number = rule.partition("=")
    if name not in RULES:
        raise Refused(f"--rule {rule}: choose {', '.join(f'{one}=NUMBER' for one in RULES)}.")
    try:
        value = float(number)
    except ValueError as error:
        raise Refused(f"--rule {rule}: {number!r} is no number; give {name}=0.9, say.") from error
    if not value > 0 or (name != "sv_ratio" and value > 1) or (name == "sv_ratio" and value < 1):
        ends = "at least 1" if name == "sv_ratio" else "more than 0 and at most 1"
        raise Refused(f"--rule {rule}: {name} is {ends}.")
    return Cut(name, value, rank, conv_rank, like_kohya)


def by_ratio(singular: Tensor, value: float) -> int:
    """How many exceed the largest over `value`."""
    return int((singular > singular[:1] / value).sum())


def by_sum(singular: Tensor, value: float) -> int:
    """The fewest that hold a share of the sum."""
    return _reaching(singular, value)


def by_norm(singular: Tensor, value: float) -> int:
    """The fewest that hold a share of the norm."""
    return _reaching(singular.square(), value**2)


def _reaching(terms: Tensor, share: float) -> int:
    """The fewest leading terms that hold a share of their sum; rounding does not add one."""
    if not len(terms):
        return 0
    reached = terms.cumsum(0) >= share * terms.sum() * (1 - 1e-12)
    return int(torch.argmax(reached.int())) + 1


COUNTS = {"sv_ratio": by_ratio, "sv_cumulative": by_sum, "sv_fro": by_norm}
