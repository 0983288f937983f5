"""Where on the path a student is trained: more often where the assessor finds it difficult.

    g_k = clip((d_k / mean d)^gamma, 1/3, 3)      d_k: mean cross-entropy of bin k (unbelieved:
                                                  the median)
    q_k = integral over bin k of s / (s - (s-1) x)² dx       x = 1 is noise
    P   = (1 - eta) g q / sum(g q) + eta / K
    t   = centre_k + U(-j_k, j_k),   j_k = half a bin (1 + chaos e_p,k), reflected at 0 and 1
    w_k = 1 / (K P_k), clipped to [0.2, 5], scaled so that sum_k P_k w_k = 1

The floor eta keeps every bin in training; the weights make up for what P does, so that the loss
expected is the uniform one. Towards "clean" q is taken from the other end. Times and bins are the
student's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from recast.errors import Refused
from recast.timesteps import EDGE

STEEPEST = 3.0  # how much more often a difficult bin may be drawn than an ordinary one
WEIGHTS = (0.2, 5.0)
TOWARDS = ("noise", "clean")


@dataclass(frozen=True)
class Profile:
    """What was found of K time bins, (K,) each: cross-entropy, pattern entropy, belief."""

    difficulty: Tensor
    pattern: Tensor
    active: Tensor

    @classmethod
    def flat(cls, bins: int) -> Profile:
        """Nothing known: every bin alike."""
        ones = torch.ones(bins, dtype=torch.float64)
        return cls(ones, torch.zeros(bins, dtype=torch.float64), ones.bool())


@dataclass(frozen=True)
class TimeSampler:
    """Probability, half width and weight of every bin, (K,) float64 each."""

    chances: Tensor
    reach: Tensor
    weights: Tensor

    def draw(self, n: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Times strictly between 0 and 1 and their weights, (n,) float32 each."""
        bins = len(self.chances)
        k = torch.multinomial(self.chances, n, replacement=True, generator=generator)
        moved = 2 * torch.rand(n, generator=generator, dtype=torch.float64) - 1
        t = (k + 0.5) / bins + moved * self.reach[k]
        t = 1 - (1 - t.abs()).abs()  # reflected at 0, then at 1
        return t.float().clamp(EDGE, 1 - EDGE), self.weights[k].float()


def sampler(
    profile: Profile, *, toward: str, shift: float = 1.0, gamma: float = 1.0, eta: float = 0.2,
    jitter: float = 1.0, chaos: bool = False, importance: bool = True,
) -> TimeSampler:  # fmt: skip
    """The sampler of a profile; `jitter` in half bins.

    `importance` off leaves every weight 1, as published: the loss expected is then another one.
    Raises Refused for a direction that is none, a shift that is not positive, no floor.
    """
    if toward not in TOWARDS:
        raise Refused(f"the shift goes towards {' or '.join(TOWARDS)}, not {toward!r}")
    if not shift > 0:
        raise Refused(f"shift {shift:g} is not positive: 1 leaves the times alone")
    if not 0 <= eta <= 1:
        raise Refused(f"eta {eta:g} is no share: the floor of the sampler is from 0 to 1")
    bins = len(profile.difficulty)
    mass = steepness(profile, gamma) * shifted(bins, shift, toward)
    chances = (1 - eta) * mass / mass.sum() + eta / bins
    reach = jitter * (1 + float(chaos) * profile.pattern.double()) / (2 * bins)
    weights = torch.ones_like(chances)
    if importance:
        weights = (1 / (bins * chances)).clamp(*WEIGHTS)
        weights = weights / (chances * weights).sum()
    return TimeSampler(chances, reach.clamp(max=1.0), weights)


def steepness(profile: Profile, gamma: float) -> Tensor:
    """g_k, (K,) float64."""
    d = profile.difficulty.double().clamp(min=1e-12)
    believed = d[profile.active]
    d = torch.where(profile.active, d, believed.median() if len(believed) else 1.0)
    return (d / d.mean()).pow(gamma).clamp(1 / STEEPEST, STEEPEST)


def shifted(bins: int, s: float, toward: str) -> Tensor:
    """q_k, (K,) float64: the integral is x / (s - (s-1) x)."""
    x = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    q = (x / (s - (s - 1) * x)).diff()
    return q if toward == "noise" else q.flip(0)
