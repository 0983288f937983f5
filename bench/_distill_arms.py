"""The arms of bench/distill: how blocks weigh, and where on the path samples are drawn.

    A0 flow only      no block term
    A1 control        the blocks' own weights
    A2 treatment      weights fused from the assessor's signals
    A3 placebo        A2's factors, dealt out over the blocks anew at each step
    A4 frozen         the mean over time of A2's weights, of the same seed
    A5 uncertainty    learned weights, exp(-s_b) KD_b + s_b (Kendall et al. 2018)
    A6 sampler        A1 with times drawn by the assessor's difficulty
    A7 loss-aware     A1 with times drawn by the root mean square loss (Nichol & Dhariwal 2021)
    A8 all            A2 with A6's times
    N1 negative       A2 with noise in place of noisy latents

Every arm's weights add up to those of A1, but for A2-literal: signals and bounds as published.
A name ends in the weight of the block term. gain measures what more weight on one block does.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from recast.distill.fusion import Fused
    from recast.distill.signals import AssessorOutput

SEEDS = 8
BINS = 20  # of the assessor, the samplers and the figures by bin
ABOUT = {
    "A0": "flow only", "A1": "control", "A2": "treatment: fused weights",
    "A3": "placebo: A2's factors shuffled over blocks", "A4": "A2's weights frozen at their mean",
    "A5": "learned weights", "A6": "control, assessor's times", "A7": "control, loss-aware times",
    "A8": "fused weights, assessor's times", "N1": "A2 on pure noise",
    "A2-literal": "treatment as published", "gain": "three times the weight for one block",
}  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """One way to weigh and draw; `kind` is a name of the table above."""

    kind: str
    weight: float

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.weight:g}" if self.weight else self.kind


def named(kinds: str, weight: float) -> list[Arm]:
    return [Arm(kind, weight) for kind in kinds.split()]


# what is run first, and with how many seeds: the question itself, then a look at each other arm
MAIN, OTHERS = "A1 A2 A3 A4", "A5 A6 A7 A8 A2-literal N1"
GROUPS: tuple[tuple[list[Arm], int], ...] = (
    ([Arm("A0", 0.0), *named(MAIN, 1.0)], SEEDS),
    (named("N1", 1.0), 3),
    (named(MAIN, 0.05), SEEDS),
    (named("gain", 1.0), 1),
    (named(OTHERS, 1.0), 2),
    (named(OTHERS, 0.05), 1),
    (named(OTHERS, 1.0), SEEDS),
    (named("gain", 1.0), SEEDS),
    (named(OTHERS, 0.05), SEEDS),
)
ARMS = {
    arm.name: arm
    for arm in (
        Arm("A0", 0.0),
        *named(f"{MAIN} {OTHERS} gain", 1.0),
        *named(f"{MAIN} {OTHERS}", 0.05),
    )
}

Weigher = Callable[[int, "AssessorOutput | None", Tensor], "Tensor | Fused"]


def constant(values: Tensor) -> Weigher:
    """The same weights at every step."""
    return lambda step, signals, kd: values


def fused(blocks: Sequence[str], normalise: str = "sum") -> Weigher:
    """A2: the product's own fusion."""
    from recast.distill.fusion import Fusion, base_weights

    fusion = Fusion(base_weights(blocks), normalise=normalise)
    fusion.self_test()

    def weigh(step: int, signals: AssessorOutput | None, kd: Tensor) -> Fused:
        assert signals is not None
        return fusion.weigh(signals)

    return weigh


def placebo(blocks: Sequence[str], seed: int) -> Weigher:
    """A3: what A2 multiplies each block's weight by goes to a block by lot; the sum is kept."""
    from dataclasses import replace

    from recast.distill.fusion import base_weights
    from recast.train.draws import seeded

    base, treatment = torch.tensor(list(base_weights(blocks).values())), fused(blocks)

    def weigh(step: int, signals: AssessorOutput | None, kd: Tensor) -> Fused:
        found: Any = treatment(step, signals, kd)
        order = torch.randperm(len(base), generator=seeded(seed, "placebo", step))
        return replace(found, values=dealt(found.values, base, order))

    return weigh


def dealt(values: Tensor, base: Tensor, order: Tensor) -> Tensor:
    """Weights whose factors values / base stand in another order, with the sum of `base`."""
    moved = base * (values / base)[order]
    return moved * base.sum() / moved.sum()


@dataclass
class Uncertainty:
    """A5: s_b descends exp(-s_b) KD_b + s_b; the weights exp(-s_b), with the sum of `base`.

    s descends the gradient 1 - exp(-s_b) KD_b and is at rest where exp(-s_b) = 1 / KD_b.
    """

    base: Tensor
    rate: float = 0.1
    s: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.s = torch.zeros(len(self.base))

    def __call__(self, step: int, signals: AssessorOutput | None, kd: Tensor) -> Tensor:
        values = torch.exp(-self.s)
        self.s = self.s - self.rate * (1 - values * kd.detach().mean(0))
        return values * self.base.sum() / values.sum()


@dataclass
class LossAware:
    """A7: bins drawn by sqrt(mean of the last losses²), a tenth of the draws uniform.

    Uniform until every bin has seen `history` losses. Weights 1 / (K P) keep the expected loss.
    """

    bins: int = BINS
    history: int = 10
    floor: float = 0.1
    seen: list[list[float]] = field(init=False)

    def __post_init__(self) -> None:
        self.seen = [[] for _ in range(self.bins)]

    def see(self, losses: Tensor, times: Tensor) -> None:
        """Remember each sample's loss in its bin."""
        for loss, t in zip(losses.tolist(), times.tolist(), strict=True):
            here = self.seen[min(int(t * self.bins), self.bins - 1)]
            here.append(loss)
            del here[: -self.history]

    def chances(self) -> Tensor:
        """P of each bin, (K,) float64."""
        even = torch.full((self.bins,), 1 / self.bins, dtype=torch.float64)
        if any(len(here) < self.history for here in self.seen):
            return even
        mean = torch.tensor(self.seen, dtype=torch.float64).square().mean(1).sqrt()
        return (1 - self.floor) * mean / mean.sum() + self.floor * even

    def draw(self, even: Tensor) -> tuple[Tensor, Tensor]:
        """Times and weights of uniform numbers (B,), by the inverse of the distribution."""
        chances = self.chances()
        ends = chances.cumsum(0)
        k = torch.searchsorted(ends, even.double().contiguous()).clamp(max=self.bins - 1)
        inside = 1 - (ends[k] - even.double()) / chances[k]
        t = (k + inside.clamp(0, 1)) / self.bins
        return t.float(), (1 / (self.bins * chances[k])).float()


def reached(curve: Sequence[Sequence[float]], goal: float) -> float:
    """The step at which a curve of (step, error) first is as low as the goal; nan if never."""
    for (step, error), (later, lower) in itertools.pairwise(curve):
        if error <= goal:
            return step
        if lower <= goal:
            return step + (later - step) * (error - goal) / (error - lower)
    return math.nan


def said(arms: Mapping[str, Arm]) -> str:
    """The arms, a line each."""
    return "\n".join(f"{name:18} {ABOUT[arm.kind]}" for name, arm in arms.items())
