"""From what the assessor says of each block to how much that block's distillation counts.

    lambda_b = clip(w_b (1 + 0.5 e_t + 0.25 e_p + 0.25 (1 - coh)), low, high)

with the signals' means over a batch, then a running mean over steps. `normalise="sum"` multiplies
by sum(w) / sum(lambda): whatever the signals say, all blocks together weigh the same, so that a run
with an assessor and one without spend the same. "none" is the formula as published; there an
assessor that knows nothing (e_t = ln 100) puts seven of nine blocks at the upper bound.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recast.errors import Refused

if TYPE_CHECKING:
    from recast.distill.signals import AssessorOutput

LEVELS, MIDDLE = (0.7, 0.9, 1.0, 1.1), 1.2
NAME = re.compile(r"(down|up)_(\d+)|mid")
GAINS = (0.5, 0.25, 0.25)  # of e_t, e_p and 1 - coh
MUCH = 0.5  # share of the blocks at a bound above which the bound decides, not the assessor


def base_weights(blocks: Sequence[str]) -> dict[str, float]:
    """What each block counts by itself: little at the ends of the UNet, most in its middle.

    Down blocks 0.7 0.9 1.0 1.1, mid 1.2, up blocks the mirror image; SDXL's three levels leave the
    1.1 out. Raises Refused for a name that is no block's.
    """
    found = {name: NAME.fullmatch(name) for name in blocks}
    for name, match in found.items():
        if match is None:
            raise Refused(f"there is no block {name!r}: blocks are down_0 …, mid, up_0 …")
    deepest = max((int(m[2]) for m in found.values() if m and m[2]), default=0)
    last = len(LEVELS) - 1

    def weight(match: re.Match[str]) -> float:
        if match[1] is None:
            return MIDDLE
        level = int(match[2]) if match[1] == "down" else deepest - int(match[2])
        return LEVELS[min(level, last)]

    return {name: weight(match) for name, match in found.items() if match}


@dataclass(frozen=True)
class Fused:
    """Weights of the blocks, (nb,) each: as used, and as clipped before mean and sum.

    `saturated` is the share of the blocks at a bound; `spread` each weight's standard deviation
    over the run so far.
    """

    values: Tensor
    raw: Tensor
    saturated: float
    spread: Tensor

    @classmethod
    def plain(cls, values: Tensor) -> Fused:
        """Weights that come from elsewhere."""
        return cls(values, values, 0.0, torch.zeros_like(values))


@dataclass
class Fusion:
    """The rule and its state; `weights` are the blocks' own, in the order of the signals' columns.

    `every`: steps from one look at the signals to the next. `literal`: see the file's docstring.
    """

    weights: Mapping[str, float]
    low: float = 0.5
    high: float = 3.0
    ema: float = 0.9
    normalise: str = "sum"
    every: int = 1
    count: int = field(default=0, init=False)
    held: Tensor | None = field(default=None, init=False)
    last: Tensor | None = field(default=None, init=False)
    sums: Tensor | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.normalise not in ("sum", "none"):
            raise Refused(f"fusion normalises by 'sum' or 'none', not by {self.normalise!r}")

    @property
    def base(self) -> Tensor:
        """The blocks' own weights, (nb,) float64."""
        return torch.tensor(list(self.weights.values()), dtype=torch.float64)

    def weigh(self, output: AssessorOutput) -> Fused:
        """The blocks' weights at this step; moves the state on.

        Raises Refused if the signals are of other blocks.
        """
        if tuple(output.blocks) != tuple(self.weights):
            raise Refused(
                f"signals are of {', '.join(output.blocks)}, the fusion's weights of "
                f"{', '.join(self.weights)}: give both the same blocks"
            )
        if self.last is None or self.count % self.every == 0:
            self.last = self.clipped(output)
            step = 0.0 if self.held is None else self.ema
            held = self.last if self.held is None else self.held
            self.held = step * held + (1 - step) * self.last
        assert self.held is not None
        values = self.held
        if self.normalise == "sum":
            values = values * self.base.sum() / values.sum()
        self.count += 1
        old = torch.zeros(2, len(values), dtype=torch.float64) if self.sums is None else self.sums
        self.sums = old + torch.stack([values, values.square()])
        mean, square = self.sums / self.count
        at_bound = (self.last <= self.low) | (self.last >= self.high)
        return Fused(
            values.float(),
            self.last.float(),
            at_bound.double().mean().item(),
            (square - mean.square()).clamp(min=0).sqrt().float(),
        )

    def clipped(self, output: AssessorOutput) -> Tensor:
        """lambda_b of a batch by the formula alone, (nb,) float64; w_b where no sample is active.

        Raises Refused for signals that are not finite.
        """
        base = self.base
        if not output.active.any():
            return base
        of = output.active.cpu()
        e_t, e_p, coh = (s.cpu()[of].double().mean(0) for s in (output.e_t, output.e_p, output.coh))
        signals = GAINS[0] * e_t + GAINS[1] * e_p + GAINS[2] * (1 - coh)
        if not signals.isfinite().all():
            raise Refused("the assessor's signals are not finite: train it anew, or in float32")
        return (base * (1 + signals)).clamp(self.low, self.high)

    def self_test(self) -> None:
        """Raise Refused unless every block's weight rises with each of its signals."""
        from recast.distill.signals import AssessorOutput

        names = tuple(self.weights)
        still, one = torch.zeros(1, len(names)), torch.ones(1, dtype=torch.bool)
        rest = self.clipped(AssessorOutput(names, still, still, still + 1, one))
        for place, (name, known) in enumerate(zip(names, rest.tolist(), strict=True)):
            moved = still.clone()
            moved[0, place] = 0.5
            for signals in (
                (moved, still, still + 1), (still, moved, still + 1), (still, still, 1 - moved),
            ):  # fmt: skip
                now = self.clipped(AssessorOutput(names, *signals, one))[place].item()
                if now <= known and known < self.high:
                    raise Refused(
                        f"the weight of {name} does not react to its signals: widen the bounds "
                        f"{self.low:g} to {self.high:g}"
                    )

    def state_dict(self) -> dict[str, Any]:
        """All that changes from step to step."""
        return {"count": self.count, "held": self.held, "last": self.last, "sums": self.sums}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.count = state["count"]
        self.held, self.last, self.sums = state["held"], state["last"], state["sums"]


def warned(fused: Fused) -> str | None:
    """One sentence where bounds decide the weights of most blocks."""
    if not fused.saturated > MUCH:
        return None
    return (
        f"{math.floor(100 * fused.saturated)} % of the blocks' weights are at a bound: the bounds "
        "decide, not the assessor; use relative signals, train the assessor, or widen the bounds."
    )
