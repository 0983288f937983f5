"""Fitting the assessor to the teacher's features. For each block, summed over blocks alike:

    L = CE(l_t, k)                              the time
      + 0.25 CE(l_p[k, :], a)                   the pattern a
      + 0.25 mean relu(1 - (l_p[a] - best other))
      + 0.05 (ln P - H(mean_B softmax l_p)) / ln P
      + 0.10 mean relu(q_min - q)^2             prototypes stay simplices
      + 0.05 (F_alpha(u) - t)^2 + 0.05 |u - t|  the position

A pattern is a given label, or else a balanced assignment: Sinkhorn over the recent samples of the
same bin, so that within each bin every prototype gets its share. Staircases are learned through a
few levels only, where their slope is bounded. alpha = 1/3 is best for a calibrated u; F_alpha(u) is
never compared with F_alpha(t), whose error alpha = 1 would hide.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from recast.distill import simplex
from recast.distill.assessor import TAU, Assessor, Probe, bin_of, heads
from recast.distill.staircase import SHALLOW, staircase
from recast.errors import NotFinite, Refused

Batch = tuple[Mapping[str, Tensor], Tensor] | tuple[Mapping[str, Tensor], Tensor, Tensor]
"""Pooled features, times (B,), and patterns (B,) where they are given."""

ROUNDS, EPSILON = 3, 0.05  # of Sinkhorn
MEMORY = 32  # recent samples of a bin, for each pattern


@dataclass(frozen=True)
class Weights:
    """What each term counts; `feature_similarity` is 0 on teacher features and may be only 0."""

    time: float = 1.0
    pattern: float = 0.25
    margin: float = 0.25
    usage: float = 0.05
    simplex: float = 0.10
    staircase: float = 0.05
    position: float = 0.05
    feature_similarity_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.feature_similarity_weight:
            raise Refused(
                "feature_similarity_weight is 0 or absent: an assessor is fitted to the teacher's "
                "own features, which that term compares with themselves."
            )


@dataclass(frozen=True)
class FitStep:
    """One step: the loss, each term's mean over blocks, each block's share of right bins."""

    step: int
    loss: float
    terms: Mapping[str, float]
    right: Mapping[str, float]
    lr: float


def fit(
    assessor: Assessor,
    batches: Iterator[Batch],
    *,
    steps: int = 3000,
    lr: float = 1e-3,
    weight_decay: float = 1e-4,
    clip: float = 1.0,
    weights: Weights | None = None,
) -> Iterator[FitStep]:
    """Train an assessor, already standardised, by AdamW under a cosine; yields every step.

    Raises NotFinite where the loss is not, with the assessor as it was before that step.
    """
    weights = weights or Weights()
    memory = {name: Memory(assessor) for name in assessor.blocks}
    optimizer = torch.optim.AdamW(assessor.parameters(), lr=lr, weight_decay=weight_decay)
    for step in range(1, steps + 1):
        rate = lr * (1 + math.cos(math.pi * (step - 1) / steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        pooled, t, *given = next(batches)
        terms, right = losses(assessor, pooled, t, memory, given[0] if given else None)
        total = sum(getattr(weights, name) * term.sum() for name, term in terms.items())
        assert isinstance(total, Tensor)
        if not total.isfinite():
            raise NotFinite(f"the assessor's loss is not finite at step {step}: lower its rate.")
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(assessor.parameters(), clip)
        optimizer.step()
        means = {name: float(term.detach().mean()) for name, term in terms.items()}
        yield FitStep(step, float(total.detach()), means, right, rate)


def losses(
    assessor: Assessor,
    pooled: Mapping[str, Tensor],
    t: Tensor,
    memory: Mapping[str, Memory],
    given: Tensor | None = None,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Each term (blocks,), and each block's share of right bins."""
    k = bin_of(t, assessor.shape.bins)
    readings = assessor(pooled)
    columns: dict[str, list[Tensor]] = {}
    right = {}
    for name, probe in heads(assessor):
        reading = readings[name]
        logits = probe.pattern_logits(reading.z, k)
        label = memory[name].assign(logits.detach(), k) if given is None else given
        found = {
            "time": F.cross_entropy(reading.time_logits, k),
            **pattern_terms(logits, label),
            "simplex": simplex.loss(probe.points),
            **position_terms(probe, reading.u, t),
        }
        for term, value in found.items():
            columns.setdefault(term, []).append(value)
        right[name] = float((reading.time_logits.argmax(1) == k).float().mean())
    return {term: torch.stack(column) for term, column in columns.items()}, right


def pattern_terms(logits: Tensor, label: Tensor) -> dict[str, Tensor]:
    """The three terms of pattern logits (B, P) and their labels (B,)."""
    patterns = logits.shape[1]
    best_other = logits.scatter(1, label[:, None], -torch.inf).amax(1)
    mean = logits.softmax(1).mean(0)
    entropy = -(mean * mean.clamp(min=1e-30).log()).sum()
    return {
        "pattern": F.cross_entropy(logits, label),
        "margin": (1 - logits.gather(1, label[:, None])[:, 0] + best_other).relu().mean(),
        "usage": 1 - entropy / math.log(patterns),
    }


def position_terms(probe: Probe, u: Tensor, t: Tensor) -> dict[str, Tensor]:
    """How far the position (B,) is from the time, on the staircase and off it."""
    placed = staircase(u, probe.alpha, SHALLOW)
    return {"staircase": (placed - t).square().mean(), "position": (u - t).abs().mean()}


class Memory:
    """The pattern logits of recent samples, bin by bin, and the balanced assignment over them.

    They were made by prototypes of a few steps ago, which saves keeping what they were made of.
    """

    def __init__(self, assessor: Assessor) -> None:
        shape = assessor.shape
        place = assessor.probe(assessor.blocks[0]).points.device
        self.depth = MEMORY * shape.patterns
        self.logits = torch.zeros(shape.bins, self.depth, shape.patterns, device=place)
        self.count = torch.zeros(shape.bins, dtype=torch.long, device=place)

    def assign(self, logits: Tensor, k: Tensor) -> Tensor:
        """Remember logits (B, P) of bins k (B,) and return each row's pattern (B,)."""
        order = k.argsort(stable=True)
        bins, which, sizes = k[order].unique_consecutive(return_inverse=True, return_counts=True)
        begin = sizes.cumsum(0) - sizes
        rank = torch.arange(len(k), device=k.device) - begin[which]
        slot = (self.count[bins][which] + rank) % self.depth
        self.logits[bins[which], slot] = logits[order].to(self.logits)
        self.count[bins] += sizes
        filled = self.count[bins].clamp(max=self.depth)
        deep = int(filled.max())
        there = torch.arange(deep, device=k.device) < filled[:, None]
        shares = sinkhorn(self.logits[bins, :deep], there)
        found = torch.empty_like(k)
        found[order] = shares[which, slot].argmax(1)
        return found


def sinkhorn(logits: Tensor, there: Tensor) -> Tensor:
    """Soft assignments (K, N, P) whose columns are alike within each bin; rows not `there` are 0.

    logits (K, N, P) are in units of 1 / tau; each row of the answer that is there sums to 1.
    """
    scores = logits * (TAU / EPSILON)
    scores = scores - scores.amax((1, 2), keepdim=True)
    mass = scores.exp() * there[..., None]
    for _ in range(ROUNDS):
        mass = mass / mass.sum(1, keepdim=True).clamp(min=1e-30)
        mass = mass / mass.sum(2, keepdim=True).clamp(min=1e-30)
    return mass
