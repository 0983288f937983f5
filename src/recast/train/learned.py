"""A loss weight that is learned: the loss of every noise level brought to the same size.

    u(c) = g w / |w| . features(c)       features(c) = sqrt(2) cos(2 pi (f c + phase))
    L'   = L exp(-u) + u                 c = log(sigma / alpha) / 4

At the minimum exp(u) is the mean loss at that noise level (Karras et al. 2024, eqs. 14 to 22). Per
sample: on the mean of a batch u would see the same loss at every level and learn nothing. The
gain g starts at 0, so that training begins with the weights as they are.
"""

import math

import torch
from torch import Tensor, nn

from recast.train.draws import seeded

EDGE = 1e-6  # alpha and sigma are kept that far off zero


class Learned(nn.Module):
    """u as a function of the noise level; frequencies and phases are drawn once, from the seed."""

    frequencies: Tensor
    phases: Tensor

    def __init__(self, seed: int = 0, features: int = 128) -> None:
        super().__init__()
        generator = seeded(seed, "learned weight")
        self.register_buffer("frequencies", torch.randn(features, generator=generator))
        self.register_buffer("phases", torch.rand(features, generator=generator))
        self.direction = nn.Parameter(torch.randn(features, generator=generator))
        self.gain = nn.Parameter(torch.zeros(()))

    def forward(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """u (B,) at the noise levels of alpha and sigma, both (B,)."""
        c = (sigma.clamp(min=EDGE) / alpha.clamp(min=EDGE)).float().log() / 4
        turns = c[:, None] * self.frequencies + self.phases
        features = math.sqrt(2) * (2 * math.pi * turns).cos()
        return self.gain * (features @ (self.direction / self.direction.norm()))

    def loss(self, weighted: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """L' (B,) of the losses (B,)."""
        u = self(alpha, sigma)
        return weighted * (-u).exp() + u
