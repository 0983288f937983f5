"""Temperatures: one for each block's time logits and one for its pattern logits.

    T = argmin over held-out samples of mean CE(l / T)        d/d(1/T) = mean(E_p[l] - l_y) = 0

The derivative rises with 1/T, so bisection finds the only zero (Guo et al. 2017, section 4.2).
A signal counts cross-entropy in nats, which an over-confident probe would overstate. Logits are
divided, never masked: a mask that is there only in use changes the cross-entropy it was fitted to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from recast.distill.assessor import Assessor, bin_of, heads
from recast.distill.fit import Memory

BOUND = 64.0  # of T and 1/T
HALVINGS = 40


def temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature of logits (N, K) for labels (N,), between 1/64 and 64."""
    logits = logits.double()
    chosen = logits.gather(1, labels[:, None])[:, 0]
    low, high = -math.log(BOUND), math.log(BOUND)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        share = (logits * math.exp(middle)).softmax(1)
        slope = ((share * logits).sum(1) - chosen).mean()
        low, high = (middle, high) if slope < 0 else (low, middle)
    return math.exp(-(low + high) / 2)


@torch.no_grad()
def calibrate(
    assessor: Assessor, pooled: Mapping[str, Tensor], t: Tensor
) -> dict[str, tuple[float, float]]:
    """Set every block's temperatures from held-out features; returns (time, pattern) by block.

    Patterns have no given label: the assignment is balanced within the bins of these samples.
    """
    k = bin_of(t, assessor.shape.bins)
    found = {}
    for name, probe in heads(assessor):
        probe.time_temperature.fill_(1)
        probe.pattern_temperature.fill_(1)
        reading = probe(pooled[name])
        logits = probe.pattern_logits(reading.z, k)
        labels = Memory(assessor).assign(logits, k)
        found[name] = (temperature(reading.time_logits, k), temperature(logits, labels))
        probe.time_temperature.fill_(found[name][0])
        probe.pattern_temperature.fill_(found[name][1])
    return found
