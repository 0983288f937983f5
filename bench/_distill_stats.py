"""Paired comparisons of arms over seeds, small enough to be exact.

t interval     mean ± t(0.975, n-1) sd / sqrt(n)
sign flips     p = share of the 2^n signings of the differences whose |mean| is at least as large
BCa            bias-corrected and accelerated bootstrap of the mean (Efron 1987)
Holm           step-down over a family of p (Holm 1979)
detectable     (t(0.975, n-1) + t(0.8, n-1)) sd / sqrt(n): the effect that would be seen at the
               5 % level four times in five
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

LEVEL = 0.05
POWER = 0.8
NORMAL = statistics.NormalDist()


@dataclass(frozen=True)
class Paired:
    """Differences over seeds, arm minus control: below 0 the arm's error is smaller."""

    deltas: tuple[float, ...]
    mean: float
    low: float
    high: float
    bca: tuple[float, float]
    p: float
    detectable: float


def paired(arm: Mapping[int, float], control: Mapping[int, float]) -> Paired | None:
    """Compare two arms over the seeds that both have; None below two."""
    seeds = sorted(arm.keys() & control.keys())
    if len(seeds) < 2:
        return None
    deltas = tuple(arm[seed] - control[seed] for seed in seeds)
    mean, half = statistics.fmean(deltas), interval(deltas)
    return Paired(
        deltas, mean, mean - half, mean + half, bca(deltas), sign_flip(deltas), detectable(deltas)
    )


def interval(values: Sequence[float]) -> float:
    """Half of the 95 % t interval of the mean."""
    n = len(values)
    return student(1 - LEVEL / 2, n - 1) * statistics.stdev(values) / math.sqrt(n)


def detectable(values: Sequence[float]) -> float:
    """The mean that values of this spread would show at the 5 % level four times in five."""
    n = len(values)
    reach = student(1 - LEVEL / 2, n - 1) + student(POWER, n - 1)
    return reach * statistics.stdev(values) / math.sqrt(n)


def sign_flip(values: Sequence[float]) -> float:
    """The exact two-sided p of the mean when signs are a coin's; at least 2 / 2^n."""
    seen = abs(sum(values))
    least = seen - 1e-9 * max(map(abs, values))
    signings = itertools.product((1, -1), repeat=len(values) - 1)
    # the first sign may stay: a signing and its mirror image have the same |mean|
    sums = (values[0] + sum(s * v for s, v in zip(sign, values[1:], strict=True))
            for sign in signings)  # fmt: skip
    return statistics.fmean(abs(total) >= least for total in sums)


def holm(found: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p of each of a family, never below the one before it."""
    adjusted: dict[str, float] = {}
    highest = 0.0
    for rank, (name, p) in enumerate(sorted(found.items(), key=lambda item: item[1])):
        highest = max(highest, min(1.0, (len(found) - rank) * p))
        adjusted[name] = highest
    return adjusted


def bca(values: Sequence[float], draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """The 95 % BCa interval of the mean; both ends are the mean where all values are alike."""
    n, mean = len(values), statistics.fmean(values)
    if max(values) == min(values):
        return mean, mean
    source = random.Random(seed)
    means = sorted(statistics.fmean(source.choices(values, k=n)) for _ in range(draws))
    below = sum(m < mean for m in means) + sum(m == mean for m in means) / 2
    bias = NORMAL.inv_cdf(min(max(below / draws, 1 / draws), 1 - 1 / draws))
    # the jackknife's mean without value i is (n mean - value) / (n - 1)
    apart = [value - mean for value in values]
    speed = sum(a**3 for a in apart) / (6 * sum(a**2 for a in apart) ** 1.5)

    def end(share: float) -> float:
        z = bias + NORMAL.inv_cdf(share)
        moved = NORMAL.cdf(bias + z / (1 - speed * z))
        return means[min(draws - 1, max(0, round(moved * draws - 0.5)))]

    return end(LEVEL / 2), end(1 - LEVEL / 2)


def correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation, ties sharing their mean rank; nan where one never changes."""
    if len(set(first)) < 2 or len(set(second)) < 2:
        return math.nan
    return statistics.correlation(ranks(first), ranks(second))


def ranks(values: Sequence[float]) -> list[float]:
    """Each value's rank from 1, ties sharing the mean."""
    ordered = sorted(values)
    place = {
        value: 1 + statistics.fmean(k for k, _ in group)
        for value, group in itertools.groupby(enumerate(ordered), key=lambda pair: pair[1])
    }  # fmt: skip
    return [place[value] for value in values]


@lru_cache
def student(share: float, freedom: int) -> float:
    """The quantile of Student's t, by bisection of its distribution."""
    low, high = -1e3, 1e3
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle, freedom) < share else (low, middle)
    return (low + high) / 2


def below(t: float, freedom: int) -> float:
    """P(T <= t) for whole degrees of freedom (Abramowitz & Stegun 26.7.3 and 26.7.4)."""
    theta = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(theta), math.cos(theta)
    total, term = 0.0, cosine if freedom % 2 else 1.0
    for k in range(1 + freedom % 2, freedom, 2):
        total += term
        term *= cosine**2 * k / (k + 1)
    inside = 2 / math.pi * (theta + sine * total) if freedom % 2 else sine * total
    return 0.5 + inside / 2
