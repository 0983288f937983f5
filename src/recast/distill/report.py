"""What an assessor can tell, and the controls without which no figure of it means anything.

mismatch   x at t, the network told another t': is it t' that is read, or t?
random     the same probe on a network of random weights: what does reading the clock take?
shuffled   features of other samples: cross-entropy has to rise
shifted    a constant on all logits: cross-entropy has to stay
untrained  a probe as drawn, literal signals: how many of S5's weights reach their bound
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from recast.distill import simplex
from recast.distill.assessor import Assessor, bin_of, heads
from recast.distill.fit import Memory
from recast.distill.fusion import Fusion, base_weights
from recast.distill.signals import absolute, assess

LEVELS = 15  # of confidence, for the calibration error
SHIFT = -20.0
PUBLISHED = 100  # bins
STILL = 1e-3  # nats that rounding may move a cross-entropy by
Pooled = Mapping[str, Tensor]


@dataclass(frozen=True)
class Bins:
    """Sums over the samples of each time bin: their number, hits, near hits, nats, e_p."""

    n: tuple[int, ...]
    right: tuple[int, ...]
    near: tuple[int, ...]
    ce: tuple[float, ...]
    entropy: tuple[float, ...]


@dataclass(frozen=True)
class BlockFigures:
    """One block: shares of time bins that are right, or at most one off; nats; calibration error.

    `pattern_ce` is against the balanced assignment within bins, `usage` the entropy of the mean
    pattern as a share of ln P; `quality` mean and least of the prototypes, `alpha` the staircase's.
    """

    n: int
    top1: float
    within1: float
    ce: float
    ece: float
    pattern_ce: float
    usage: float
    quality: tuple[float, float]
    alpha: float
    temperatures: tuple[float, float]
    bins: Bins


@dataclass(frozen=True)
class Against:
    """A block's shares of samples read as the time that was fed, and as the true one."""

    fed: float
    fed_within1: float
    true: float
    true_within1: float


@torch.no_grad()
def measure(assessor: Assessor, pooled: Pooled, t: Tensor) -> dict[str, BlockFigures]:
    """Figures of every block on features at times t (N,)."""
    bins = assessor.shape.bins
    k = bin_of(t, bins)
    found = {}
    for name, probe in heads(assessor):
        reading = probe(pooled[name])
        logits = probe.pattern_logits(reading.z, k)
        labels = Memory(assessor).assign(logits, k)
        mean = logits.softmax(1).mean(0)
        q = simplex.quality(probe.points.detach())
        one = _bins(reading.time_logits, logits, k, bins)
        count = max(1, len(k))
        found[name] = BlockFigures(
            n=len(k),
            top1=sum(one.right) / count,
            within1=sum(one.near) / count,
            ce=sum(one.ce) / count,
            ece=calibration_error(reading.time_logits, k),
            pattern_ce=float(F.cross_entropy(logits, labels)),
            usage=float(-(mean * mean.clamp(min=1e-30).log()).sum()) / math.log(len(mean)),
            quality=(float(q.mean()), float(q.min())),
            alpha=float(probe.alpha),
            temperatures=(float(probe.time_temperature), float(probe.pattern_temperature)),
            bins=one,
        )
    return found


def calibration_error(logits: Tensor, labels: Tensor) -> float:
    """Expected distance of confidence from accuracy over 15 levels of confidence."""
    confidence, chosen = logits.softmax(1).max(1)
    level = (confidence * LEVELS).long().clamp(max=LEVELS - 1)
    gaps = (confidence - (chosen == labels).float()).double()
    sums = torch.zeros(LEVELS, dtype=torch.float64, device=gaps.device).index_add(0, level, gaps)
    return float(sums.abs().sum() / max(1, len(labels)))


@torch.no_grad()
def mismatch(assessor: Assessor, pooled: Pooled, fed: Tensor, true: Tensor) -> dict[str, Against]:
    """Whether a block reads the time its network was told, fed (N,), or its input's, true (N,)."""
    found = {}
    for name, probe in heads(assessor):
        guess = probe(pooled[name]).time_logits.argmax(1)
        shares = []
        for t in (fed, true):
            off = (guess - bin_of(t, assessor.shape.bins)).abs()
            shares += [float((off == 0).float().mean()), float((off <= 1).float().mean())]
        found[name] = Against(*shares)
    return found


def shuffled(assessor: Assessor, pooled: Pooled, t: Tensor, seed: int = 0) -> tuple[float, float]:
    """Mean e_t in nats, of the features as they are and of those of other samples."""
    order = torch.randperm(len(t), generator=Generator().manual_seed(seed)).to(t.device)
    other = {name: each[order] for name, each in pooled.items()}
    before, after = (absolute(assessor, each, t)[0].mean() for each in (pooled, other))
    return float(before), float(after)


def shifted(assessor: Assessor, pooled: Pooled, t: Tensor) -> float:
    """The largest change of an e_t, in nats, when 20 is taken from every time logit."""
    other = deepcopy(assessor)
    with torch.no_grad():
        for _, probe in heads(other):
            probe.time_bias.add_(SHIFT)
    before, after = (absolute(each, pooled, t)[0] for each in (assessor, other))
    return float((after - before).abs().max())


def untrained(assessor: Assessor, pooled: Pooled, t: Tensor, seed: int = 0) -> dict[str, float]:
    """S5's block weights, as published, from a probe of 100 bins as it is drawn: each lambda."""
    shape = replace(assessor.shape, bins=PUBLISHED)
    fresh = Assessor(shape, Generator().manual_seed(seed)).to(t.device)
    fresh.standardise(pooled)
    fusion = Fusion(base_weights(fresh.blocks), normalise="none")
    fused = fusion.weigh(assess(fresh, pooled, t, form="literal"))
    return dict(zip(fresh.blocks, fused.raw.tolist(), strict=True))


def over_blocks(figures: Mapping[str, BlockFigures], what: str) -> Tensor:
    """Mean over blocks of a figure of the bins, (K,) float64; per sample but for n and right."""
    rows = torch.tensor([getattr(each.bins, what) for each in figures.values()]).double().mean(0)
    if what in ("n", "right"):
        return rows
    n = torch.tensor([each.bins.n for each in figures.values()]).double().mean(0)
    return rows / n.clamp(min=1)


def _bins(time_logits: Tensor, pattern_logits: Tensor, k: Tensor, bins: int) -> Bins:
    def sums(values: Tensor) -> list[float]:
        zero = torch.zeros(bins, dtype=torch.float64, device=k.device)
        return zero.index_add(0, k, values.double()).tolist()

    off = (time_logits.argmax(1) - k).abs()
    share = pattern_logits.log_softmax(1)
    entropy = -(share.exp() * share).sum(1) / math.log(share.shape[1])
    n, right, near = (
        tuple(int(count) for count in sums(each)) for each in (off >= 0, off == 0, off <= 1)
    )
    ce = F.cross_entropy(time_logits, k, reduction="none")
    return Bins(n, right, near, tuple(sums(ce)), tuple(sums(entropy)))
