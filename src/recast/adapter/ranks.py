"""Which rank each layer gets.

    64               every layer
    full             the short side of the layer: nothing is left out
    energy:0.9       the fewest directions that hold 90 % of the squared norm
    score:-3.55      those with sigma >= 10^-3.55 |W|, W the checkpoint's weight (resize_lora's
                     fro_ckpt: whatever the size of the layer, the same share of what was there)
    error:0.01       the fewest that come within 1 % of the weight or change, in norm
    energy:0.9:128   no more than 128 of them (score likewise)
    te=16            a rule for one part: unet, te, te1, te2
    OUT01=128        a rule for a block, a glob of blocks (OUT*), or a kind (conv, linear)

Of several rules that fit a layer the last counts.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor

from recast.errors import Refused
from recast.layout import Site
from recast.lowrank import Chooser, rank_for_energy

PARTS = {"unet": ("unet",), "te": ("te1", "te2"), "te1": ("te1",), "te2": ("te2",)}
KINDS = ("conv", "linear")
MIXED_ALPHA = 64.0  # of a file whose ranks are known only when it is written


@dataclass(frozen=True)
class Rule:
    """One rule: kind fixed, full, energy, error or score, its number, and the most it may give."""

    kind: str
    value: float = 0.0
    most: int | None = None

    def count(self, singular: Tensor, norm: float) -> int:
        """The rank for singular values, falling; norm: of the checkpoint's weight. 0 for none."""
        if self.kind == "energy":
            found = rank_for_energy(singular, self.value) if singular.any() else 0
        elif self.kind == "error":
            found = rank_for_energy(singular, 1 - self.value**2) if singular.any() else 0
        elif self.kind == "score":
            found = int((singular >= 10**self.value * norm).sum())
        else:
            found = len(singular) if self.kind == "full" else int(self.value)
        return found if self.most is None else min(found, self.most)


@dataclass(frozen=True)
class Ranks:
    """Rules by what they are for: the first for every layer, later ones for what they name."""

    rules: tuple[tuple[str, Rule], ...]
    text: str

    @property
    def fixed(self) -> bool:
        """Whether every layer has the same given rank."""
        return len(self.rules) == 1 and self.rules[0][1].kind == "fixed"

    def of(self, site: Site) -> Rule:
        """The rule of one layer."""
        return [rule for name, rule in self.rules if _fits(name, site)][-1]

    def check(self, sites: Iterable[Site]) -> None:
        """Refuse a rule that fits none of the layers."""
        listed = list(sites)
        for name, _ in self.rules[1:]:
            if not any(_fits(name, site) for site in listed):
                known = [*PARTS, *KINDS, *sorted({site.block for site in listed})]
                near = difflib.get_close_matches(name, known, 1, 0)[0]
                raise Refused(
                    f"--rank {name}=…: no layer that is split is in {name!r}; did you mean {near}, "
                    "or is it missing in --profile?"
                )

    def alpha(self, sites: Iterable[Site]) -> float:
        """The file's one alpha: the commonest rank, or MIXED_ALPHA where ranks are found later."""
        rules = [self.of(site) for site in sites]
        if any(rule.kind != "fixed" for rule in rules):
            return MIXED_ALPHA
        counts = Counter(int(rule.value) for rule in rules)
        return float(max(counts, key=lambda rank: (counts[rank], rank)))

    def wanted(self, site: Site) -> int | Chooser:
        """What `factorize` is to be asked for a layer of a checkpoint."""
        rule = self.of(site)
        if rule.kind == "fixed":
            return int(rule.value)
        if rule.kind == "full":
            return min(site.shape[0], _columns(site.shape))
        return lambda singular: rule.count(singular, float(singular.double().norm()))


def ranks(given: int | str | Sequence[str] | Ranks) -> Ranks:
    """Rules from a number or the command line's texts; the default rank is 64.

    Raises Refused for a rank below 1 and for what is no rule.
    """
    if isinstance(given, Ranks):
        return given
    texts = [str(given)] if isinstance(given, int | str) else list(given)
    rules: list[tuple[str, Rule]] = []
    default = Rule("fixed", 64)
    for text in texts:
        name, equals, rest = text.rpartition("=")
        if equals:
            rules.append((name.strip(), _rule(rest.strip(), text)))
        else:
            default = _rule(text.strip(), text)
    return Ranks((("", default), *rules), " ".join(texts))


def _rule(text: str, whole: str) -> Rule:
    kind, *numbers = text.split(":")
    try:
        if text == "full":
            return Rule("full")
        if kind in ("energy", "error", "score") and len(numbers) in (1, 2):
            most = int(numbers[1]) if len(numbers) == 2 else None
            return _sound(Rule(kind, float(numbers[0]), most), whole)
        return _sound(Rule("fixed", int(text)), whole)
    except ValueError as error:
        raise Refused(
            f"--rank {whole}: {text!r} is no rank; give a number, full, energy:0.9, error:0.01, "
            "score:-3.55, or NAME=RANK for a part or block."
        ) from error


def _sound(rule: Rule, whole: str) -> Rule:
    if rule.kind in ("energy", "error") and not 0 < rule.value <= 1:
        raise Refused(f"--rank {whole}: {rule.kind} is a share; give more than 0 and at most 1.")
    if (rule.kind == "fixed" and rule.value < 1) or (rule.most is not None and rule.most < 1):
        raise Refused(f"--rank {whole}: give a rank of at least 1.")
    return rule


def _fits(name: str, site: Site) -> bool:
    if name in PARTS:
        return site.part in PARTS[name]
    return name in ("", site.kind) or fnmatchcase(site.block, name)


def _columns(shape: tuple[int, ...]) -> int:
    count = 1
    for side in shape[1:]:
        count *= side
    return count
