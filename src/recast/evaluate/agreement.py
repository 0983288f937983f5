"""Same-noise agreement: do two models make the same picture from the same noise and prompt?"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recast.evaluate.metrics import psnr, ssim


@dataclass(frozen=True)
class Agreement:
    """PSNR in dB of each pair, with mean, standard deviation and worst pair; mean SSIM."""

    mean: float
    spread: float
    worst: float
    ssim: float
    each: tuple[float, ...]


def agreement(originals: Sequence[Tensor], others: Sequence[Tensor]) -> Agreement:
    """Compare pictures (3, H, W) in [-1, 1] pair by pair; the mean is of decibels, not of errors.

    Raises ValueError for lists of different lengths or without any pair.
    """
    pairs = [(a[None], b[None]) for a, b in zip(originals, others, strict=True)]
    if not pairs:
        raise ValueError("agreement of no pictures")
    each = torch.cat([psnr(a, b) for a, b in pairs])
    alike = torch.cat([ssim(a, b) for a, b in pairs])
    return Agreement(
        mean=each.mean().item(),
        spread=each.std(correction=0).item(),
        worst=each.min().item(),
        ssim=alike.mean().item(),
        each=tuple(each.tolist()),
    )
