"""Random matrices with the singular values of trained layers, made without an SVD.

    W = s U diag(c) V^T + b N        c_i = i^-p / |i^-p|        rms of W: 1

s^2 is the law's share of the squared norm; N is Gaussian noise with the rest. U and V are
orthonormal: blocks made once for each side and then shuffled and signed row by row, which keeps
them so. The law is drawn up to rank 256 only and what lies beyond joins the noise: its singular
values there are below the largest of the noise, which is about b (sqrt(rows) + sqrt(columns)), in
every layer of SDXL and SD 1.5, so that the spectrum of W is hardly another.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

from recast.errors import Refused

if TYPE_CHECKING:
    from torch import Generator, Tensor

# the law's share of the squared norm, and its power p
SPECTRA = {"half": (0.5, 0.5), "steep": (0.9, 1.0), "flat": (0.1, 0.5), "noise": (0.0, 0.0)}
DRAWN = 256


def draw(shape: tuple[int, ...], spectrum: str, generator: Generator) -> Tensor:
    """A tensor whose matrix (O, I*kh*kw) has a spectrum of SPECTRA; fp32, rms 1.

    `noise`, and what has fewer than two dimensions, is Gaussian. Raises Refused for another name.
    """
    import torch

    if spectrum not in SPECTRA:
        raise Refused(f"no spectrum is called {spectrum!r}; choose {', '.join(SPECTRA)}.")
    share, power = SPECTRA[spectrum]
    values = torch.randn(shape, generator=generator)
    if share == 0 or len(shape) < 2:
        return values
    rows, columns = shape[0], math.prod(shape[1:])
    law = torch.arange(1.0, min(rows, columns) + 1) ** -power
    law *= math.sqrt(share * rows * columns) / law.norm()
    law = law[:DRAWN]
    noise = 1 - law.square().sum().item() / (rows * columns)
    up = _orthonormal(rows, len(law), generator)
    down = _orthonormal(columns, len(law), generator)
    values.mul_(math.sqrt(noise)).view(rows, columns).addmm_(up * law, down.T)
    return values


def _orthonormal(side: int, count: int, generator: Generator) -> Tensor:
    """Orthonormal columns (side, count)."""
    import torch

    order = torch.randperm(side, generator=generator)
    sign = torch.randint(0, 2, (side, 1), generator=generator) * 2.0 - 1.0
    return _block(side)[order, :count] * sign


@lru_cache(maxsize=64)
def _block(side: int) -> Tensor:
    import torch

    made = torch.Generator().manual_seed(side)
    return torch.linalg.qr(torch.randn(side, min(side, DRAWN), generator=made))[0]
