"""How much a noise level counts in the loss: one weight per sample, from alpha, sigma, objective.

    SNR = (alpha/sigma)^2
    k   = (sigma / (alpha b - sigma a))^2       squared error of x0 per squared error of the output

At a given x, an output wrong by d makes x0 wrong by (sigma/det) d, det as in `objective.py`. So a
weight w on the x0 loss is a weight w k on the output's, whatever the objective:

    eps: k = 1/SNR      v: k = 1/(SNR + 1)      x0: k = 1      flow: k = t^2

which reproduces the published pairs of formulas and extends them to flow. The SNR is the path's,
hence that after any zero-terminal-SNR rescale. Weights multiply the *sample's* loss, after its mean
over C, H, W, never the mean of a batch. All are finite at both ends of every path, and positive at
pure noise, where the usual formulas give nothing and the network would never learn to begin.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from recast.objective import Objective

Weighting = Callable[[Tensor, Tensor, Objective], Tensor]
"""(alpha, sigma, objective) -> weight, all (B,)."""

LAST_SNR = 0.00468
"""SNR at Stable Diffusion's last step: less signal than that counts as much as that."""

EDGE = 1e-6


def snr_and_gain(alpha: Tensor, sigma: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """(SNR, k) with alpha and sigma kept a hair off zero, so that both are finite."""
    alpha, sigma = alpha.clamp(min=EDGE), sigma.clamp(min=EDGE)
    a, b = objective.predicts(alpha, sigma)
    return (alpha / sigma) ** 2, (sigma / (alpha * b - sigma * a)) ** 2


def uniform() -> Weighting:
    """1: the loss as the network's output has it."""
    return lambda alpha, sigma, objective: torch.ones_like(alpha)


def min_snr(gamma: float = 5.0, floor: float = LAST_SNR) -> Weighting:
    """min(SNR, gamma) on x0 (Hang et al. 2023, eq. 7); below `floor` SNR counts as floor."""

    def weight(alpha: Tensor, sigma: Tensor, objective: Objective) -> Tensor:
        snr, k = snr_and_gain(alpha, sigma, objective)
        return snr.clamp(floor, gamma) * k

    return weight


def soft_min_snr(gamma: float = 5.0, floor: float = LAST_SNR) -> Weighting:
    """1 / (1/SNR + 1/gamma) on x0: min-SNR without the corner (Crowson et al. 2024)."""

    def weight(alpha: Tensor, sigma: Tensor, objective: Objective) -> Tensor:
        snr, k = snr_and_gain(alpha, sigma, objective)
        return k / (1 / snr.clamp(min=floor) + 1 / gamma)

    return weight


def debiased_onetrainer() -> Weighting:
    """sqrt(k): eps 1/sqrt(SNR), v 1/sqrt(SNR + 1) (Yu et al. 2023, as OneTrainer has it)."""

    def weight(alpha: Tensor, sigma: Tensor, objective: Objective) -> Tensor:
        _, k = snr_and_gain(alpha, sigma, objective)
        return k.clamp(min=1e-3).sqrt()

    return weight


def debiased_kohya() -> Weighting:
    """eps 1/sqrt(SNR), but v 1/(SNR + 1), as kohya's scripts have it.

    That is sqrt(k) for a prediction without an x0 part and k for all others. SNR counts as at most
    1000.
    """

    def weight(alpha: Tensor, sigma: Tensor, objective: Objective) -> Tensor:
        _, k = snr_and_gain(alpha, sigma, objective)
        a, _ = objective.predicts(alpha, sigma)
        k = k.clamp(min=1e-3)
        return torch.where(a == 0, k.sqrt(), k)

    return weight


def p2(k: float = 1.0, gamma: float = 1.0, floor: float = LAST_SNR) -> Weighting:
    """1 / (k + SNR)^gamma on eps (Choi et al. 2022, eq. 8)."""

    def weight(alpha: Tensor, sigma: Tensor, objective: Objective) -> Tensor:
        snr, gain = snr_and_gain(alpha, sigma, objective)
        snr = snr.clamp(min=floor)
        return gain * snr / (k + snr) ** gamma

    return weight


WEIGHTINGS: dict[str, Callable[..., Weighting]] = {
    "uniform": uniform,
    "min-snr": min_snr,
    "soft-min-snr": soft_min_snr,
    "debiased-kohya": debiased_kohya,
    "debiased-onetrainer": debiased_onetrainer,
    "p2": p2,
}
