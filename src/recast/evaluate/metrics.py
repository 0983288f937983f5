"""Image figures that need no weights: agreement of two pictures, and what a collapse does to one.

    PSNR = 10 log10(peak² / MSE)
    SSIM = (2 m_a m_b + c1)(2 s_ab + c2) / ((m_a² + m_b² + c1)(s_a² + s_b² + c2)), Wang et al. 2004

Pictures are (B, 3, H, W) in [-1, 1] throughout; every figure is per picture, (B,), float64.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from recast.evaluate.values import Statistics

PSNR_CAP = 100.0  # dB; equal pictures would give infinity, which no table or JSON file can hold
PEAK = 2.0  # from black to white


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, at most PSNR_CAP."""
    mse = (a.double() - b.double()).square().flatten(1).mean(1)
    return (10 * torch.log10(PEAK**2 / mse.clamp(min=1e-300))).clamp(max=PSNR_CAP)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity, mean over channels and pixels; 11-tap Gaussian window of sigma 1.5.

    Windows lie wholly inside the picture, which must be at least 11 pixels on each side.
    """
    taps = torch.exp(-(torch.arange(-5, 6, dtype=torch.float64) ** 2) / (2 * 1.5**2))
    window = (taps[:, None] * taps / taps.sum() ** 2).expand(3, 1, 11, 11).to(a.device)

    def mean(x: Tensor) -> Tensor:
        return F.conv2d(x, window, groups=3)

    a, b = a.double(), b.double()
    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2
    both = mean(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    top = (2 * mean_a * mean_b + c1) * (2 * both + c2)
    return (top / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).flatten(1).mean(1)


def total_variation(pictures: Tensor) -> Tensor:
    """Mean absolute step between neighbours: high for noise, near 0 for fog."""
    x = pictures.double()
    across = (x[..., 1:] - x[..., :-1]).abs().flatten(1).mean(1)
    down = (x[..., 1:, :] - x[..., :-1, :]).abs().flatten(1).mean(1)
    return (across + down) / 2


def colour_entropy(pictures: Tensor) -> Tensor:
    """Bits of the histogram over 8 x 8 x 8 colours, 0 (one colour) to 9 (all alike)."""
    share = histogram(pictures)
    return -(share * torch.log2(share.clamp(min=1e-300))).sum(1)


def histogram(pictures: Tensor) -> Tensor:
    """Share of each of 8 x 8 x 8 colours, (B, 512)."""
    levels = ((pictures.double() + 1) * 4).long().clamp(0, 7)
    cells = (levels[:, 0] * 64 + levels[:, 1] * 8 + levels[:, 2]).flatten(1)
    counts = torch.stack([torch.bincount(row, minlength=512) for row in cells]).double()
    return counts / counts.sum(1, keepdim=True)


def sharpness(pictures: Tensor) -> Tensor:
    """Variance of the luminance's Laplacian: falls with blur, grows with noise and ringing."""
    grey = pictures.double().mean(1)
    inner = grey[:, 1:-1, 1:-1]
    across = grey[:, 1:-1, 2:] + grey[:, 1:-1, :-2]
    down = grey[:, 2:, 1:-1] + grey[:, :-2, 1:-1]
    return (across + down - 4 * inner).flatten(1).var(1)


def spectrum_slope(pictures: Tensor) -> Tensor:
    """Slope of the luminance's log power over log frequency: -2 for photographs, 0 for noise."""
    grey = pictures.double().mean(1)
    height, width = grey.shape[-2:]
    power = torch.fft.fft2(grey - grey.mean((-2, -1), keepdim=True)).abs().square()
    fy, fx = torch.fft.fftfreq(height).to(grey), torch.fft.fftfreq(width).to(grey)
    radius = (fy[:, None].square() + fx.square()).sqrt()
    bins = (radius * min(height, width)).round().long()
    used = range(1, min(height, width) // 2)
    rings = torch.stack([power[:, bins == k].mean(1) for k in used], 1).clamp(min=1e-12).log()
    logf = torch.tensor([math.log(k) for k in used]).to(grey)
    centred = logf - logf.mean()
    return (rings * centred).sum(1) / centred.square().sum()


def statistics(pictures: Sequence[Tensor]) -> Statistics:
    """Measure pictures (3, H, W), of any sizes; raises ValueError without any."""
    if not pictures:
        raise ValueError("statistics of no pictures")
    rows = []
    for picture in pictures:
        x = picture[None].double()
        spread = x.amax(1) - x.amin(1)
        rows.append(
            torch.stack(
                [
                    total_variation(x)[0],
                    colour_entropy(x)[0],
                    spectrum_slope(x)[0],
                    x.mean(),
                    x.mean(1).std(),
                    spread.mean(),
                    sharpness(x)[0],
                ]
            )
        )
    return Statistics(*(round(value, 6) for value in torch.stack(rows).mean(0).tolist()))
