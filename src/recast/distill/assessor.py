"""The assessor: from pooled features of a block it reads the time, and which pattern they show.

    p~ = (p - mu) / sigma              of the teacher's features; stored, never learned
    z  = g(p~) / |g(p~)|               g = Linear(h, d) GELU Linear(C, h)
    l_t[k] = s z.w_k + c_k             the time, one of K bins; s > 0 is learned, 16 at first
    l_p[k, j]                          the pattern j in bin k, from the five points v of its simplex
        rose        z . (sum_v r_v v) / tau      r = (1, -3/4, 3/4, 3/4, -3/4); linear in z
        subcentre   log sum_v exp(z.v / tau)     the nearest point's, softly
        centroid    z . (mean_v v) / tau
    u = sigmoid(a.z + b)               the position on the path; F_alpha(u) is to be t

Bins are of the path's time: k = floor(t K). Logits are divided by the block's temperature, 1 until
it is calibrated.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from recast.distill import simplex
from recast.distill.staircase import HIGH, LOW
from recast.errors import Refused

ROSE = (1.0, -0.75, 0.75, 0.75, -0.75)
TAU = 0.07
SCALE = 16.0
PatternHead = Literal["rose", "subcentre", "centroid"]
Prototypes = Literal["per_bin", "shared"]
PATTERN_HEADS: tuple[PatternHead, ...] = ("rose", "subcentre", "centroid")


@dataclass(frozen=True)
class Shape:
    """Sizes and kinds of an assessor's parts; `channels` are the widths of the pooled features.

    Raises Refused for a pattern head or prototypes that there are not.
    """

    channels: Mapping[str, int]
    d: int = 128
    hidden: int = 256
    bins: int = 100
    patterns: int = 10
    prototypes: Prototypes = "per_bin"
    pattern_head: PatternHead = "subcentre"

    def __post_init__(self) -> None:
        if self.pattern_head not in PATTERN_HEADS:
            raise Refused(
                f"no pattern head {self.pattern_head!r}: choose {', '.join(PATTERN_HEADS)}."
            )
        if self.prototypes not in ("per_bin", "shared"):
            raise Refused(f"prototypes are per_bin or shared, not {self.prototypes!r}.")
        if not self.channels:
            raise Refused("an assessor needs a block at least.")
        if min(self.bins, self.patterns) < 2:
            raise Refused("an assessor tells at least 2 bins and 2 patterns apart.")


@dataclass(frozen=True)
class Reading:
    """What a block's features say: z (B, d) of length 1, time_logits (B, K), position u (B,)."""

    z: Tensor
    time_logits: Tensor
    u: Tensor


def widths(pooled: Mapping[str, Tensor]) -> dict[str, int]:
    """The channels of a shape that reads these pooled features."""
    return {name: each.shape[1] for name, each in pooled.items()}


def bin_of(t: Tensor, bins: int) -> Tensor:
    """The bin (B,) of times in [0, 1]; 1 belongs to the last."""
    return (t * bins).floor().long().clamp(0, bins - 1)


class Probe(nn.Module):
    """The assessor of one block."""

    mean: Tensor
    std: Tensor
    time_temperature: Tensor
    pattern_temperature: Tensor

    def __init__(self, channels: int, shape: Shape, generator: Generator | None = None) -> None:
        super().__init__()
        self.shape = shape
        d, bins = shape.d, shape.bins
        self.first = _linear(channels, shape.hidden, generator)
        self.second = _linear(shape.hidden, d, generator)
        self.time = nn.Parameter(F.normalize(torch.randn(bins, d, generator=generator), dim=1))
        self.time_bias = nn.Parameter(torch.zeros(bins))
        self.log_scale = nn.Parameter(torch.tensor(math.log(SCALE)))
        rows = (bins, shape.patterns) if shape.prototypes == "per_bin" else (shape.patterns,)
        self.points = nn.Parameter(simplex.prototypes(rows, d, generator=generator))
        self.place = _linear(d, 1, generator)
        # alpha = 1/3: the staircase begins as the identity
        self.rho = nn.Parameter(torch.tensor(-math.log(2)))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))
        self.register_buffer("time_temperature", torch.ones(()))
        self.register_buffer("pattern_temperature", torch.ones(()))

    @property
    def alpha(self) -> Tensor:
        """The mass of the staircase's middle third, within the bounds of learning."""
        return self.rho.sigmoid().clamp(LOW, HIGH)

    def forward(self, pooled: Tensor) -> Reading:
        standard = (pooled.float() - self.mean) / self.std
        z = F.normalize(self.second(F.gelu(self.first(standard))), dim=1)
        logits = self.log_scale.exp() * (z @ self.time.mT) + self.time_bias
        return Reading(z, logits / self.time_temperature, self.place(z)[:, 0].sigmoid())

    def pattern_logits(self, z: Tensor, k: Tensor) -> Tensor:
        """Logits (B, P) of the patterns of each row's bin, k (B,)."""
        logits = _pattern_logits(z, k, self.points, self.shape.pattern_head)
        return logits / self.pattern_temperature


class Assessor(nn.Module):
    """A probe for each block; forward reads pooled features, block -> (B, C), in fp32."""

    def __init__(self, shape: Shape, generator: Generator | None = None) -> None:
        super().__init__()
        self.shape = shape
        self.probes = nn.ModuleDict(
            {name: Probe(width, shape, generator) for name, width in shape.channels.items()}
        )

    @property
    def blocks(self) -> tuple[str, ...]:
        """The blocks it reads, in order."""
        return tuple(self.shape.channels)

    def probe(self, block: str) -> Probe:
        """The part that reads one block; raises Refused for a block it does not know."""
        if block not in self.shape.channels:
            raise Refused(
                f"the assessor knows no block {block}: it reads {', '.join(self.blocks)}."
            )
        return self.probes[block]  # type: ignore[return-value]

    def forward(self, pooled: Mapping[str, Tensor]) -> dict[str, Reading]:
        """Raises Refused unless every block's features are there, of the right width."""
        self.check(pooled)
        return {name: self.probe(name)(pooled[name]) for name in self.blocks}

    def check(self, pooled: Mapping[str, Tensor]) -> None:
        """Raise Refused where a block's features are missing or of another width."""
        if missing := [name for name in self.blocks if name not in pooled]:
            raise Refused(
                f"features of block {', '.join(missing)} are missing: the assessor reads "
                f"{', '.join(self.blocks)}."
            )
        for name, width in self.shape.channels.items():
            if pooled[name].shape[1] != width:
                raise Refused(
                    f"block {name} has {pooled[name].shape[1]} pooled features and the assessor "
                    f"reads {width}: it belongs to another architecture or pooling."
                )

    def pattern_logits(self, block: str, z: Tensor, k: Tensor) -> Tensor:
        """Logits (B, P) of the patterns of each row's bin, k (B,)."""
        return self.probe(block).pattern_logits(z, k)

    @torch.no_grad()
    def standardise(self, pooled: Mapping[str, Tensor]) -> None:
        """Take mean and spread of each channel from the teacher's features (N, C)."""
        self.check(pooled)
        for name in self.blocks:
            probe, features = self.probe(name), pooled[name].float()
            probe.mean.copy_(features.mean(0))
            spread = features.std(0, correction=0)
            # a channel that never moves carries nothing, and must not be blown up
            probe.std.copy_(spread.clamp(min=1e-3 * spread.square().mean().sqrt() + 1e-12))

    def parameter_count(self) -> int:
        return sum(each.numel() for each in self.parameters())


def _pattern_logits(z: Tensor, k: Tensor, points: Tensor, head: PatternHead) -> Tensor:
    """As `Probe.pattern_logits`, before the temperature; points are (K, P, 5, d) or (P, 5, d)."""
    if head != "subcentre":
        role = torch.tensor(ROSE) if head == "rose" else torch.full((len(ROSE),), 1 / len(ROSE))
        centre = torch.einsum("v,...vd->...d", role.to(points), points)
        return _products(z, k, centre) / TAU
    near = _products(z, k, points.flatten(-3, -2)).unflatten(1, (points.shape[-3], -1))
    return (near / TAU).logsumexp(2)


def _products(z: Tensor, k: Tensor, vectors: Tensor) -> Tensor:
    """z.v (B, n) for vectors (n, d), or (K, n, d) of which each row has its own bin's."""
    if vectors.dim() == 2:
        return z @ vectors.mT
    return torch.einsum("bd,bnd->bn", z, vectors[k])


def _linear(inside: int, outside: int, generator: Generator | None) -> nn.Linear:
    """A linear layer drawn from the generator, with torch's own spread."""
    layer = nn.Linear(inside, outside)
    bound = 1 / math.sqrt(inside)
    with torch.no_grad():
        for each in (layer.weight, layer.bias):
            each.copy_(bound * (2 * torch.rand(each.shape, generator=generator) - 1))
    return layer


def heads(assessor: Assessor) -> Iterable[tuple[str, Probe]]:
    """Its blocks and their probes, in order."""
    return ((name, assessor.probe(name)) for name in assessor.blocks)
