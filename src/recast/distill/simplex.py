"""Simplices of five points, the prototypes of patterns, and how far from degenerate they are.

    A = [v1 - v0, …, v4 - v0]        V = sqrt(det(A A^T)) / 4!        V^2 = -det(CM) / 9216
    q = V / (sqrt(5)/96 l^4)         in [0, 1], 1 only if regular; l the rms of the ten edges
    loss = mean relu(q_min - q)^2

CM is the 6x6 Cayley-Menger matrix of squared distances, which serves tests only: the edge Gram
matrix gives the same volume from a smaller determinant. The loss keeps prototypes apart; it says
nothing about pictures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from recast.errors import Refused

VERTICES = 5
REGULAR = math.sqrt(5) / 96  # volume of the regular 4-simplex of edge 1
TINY = 1e-6  # added to the unit Gram matrix, so that a flat simplex has a gradient


def regular(
    shape: Sequence[int], d: int, *, edge: float = 1.0, generator: Generator | None = None
) -> Tensor:
    """Regular simplices (*shape, 5, d) about the origin, in random frames; refuses d below 4."""
    if d < VERTICES - 1:
        raise Refused(f"a simplex of {VERTICES} points needs {VERTICES - 1} dimensions, not {d}.")
    frame, _ = torch.linalg.qr(torch.randn(*shape, d, VERTICES - 1, generator=generator))
    return edge * (_corners() @ frame.mT)


def prototypes(
    shape: Sequence[int], d: int, *, edge: float = 1.0, generator: Generator | None = None
) -> Tensor:
    """Regular simplices about random unit centres, (*shape, 5, d), every point then of length 1."""
    centre = torch.randn(*shape, 1, d, generator=generator)
    around = regular(shape, d, edge=edge, generator=generator)
    return torch.nn.functional.normalize(
        torch.nn.functional.normalize(centre, dim=-1) + around, dim=-1
    )


def volume(points: Tensor) -> Tensor:
    """Volumes (...) of simplices (..., 5, d), in fp32 at least."""
    sign, log = torch.linalg.slogdet(_gram(points))
    return torch.where(sign > 0, (log / 2).exp(), 0) / math.factorial(VERTICES - 1)


def quality(points: Tensor) -> Tensor:
    """q (...) in [0, 1] of simplices (..., 5, d): 1 if regular, 0 if flat, whatever their size."""
    gram = _gram(points)
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    # the ten squared edges: four from v0, and a + b - 2 ab between the others
    total = VERTICES * diagonal.sum(-1) - gram.sum((-2, -1))
    square = total / math.comb(VERTICES, 2)
    # of unit size, so that neither tiny nor huge simplices leave fp32
    unit = gram / square.clamp(min=torch.finfo(gram.dtype).tiny)[..., None, None]
    unit = unit + TINY * torch.eye(VERTICES - 1, dtype=gram.dtype, device=gram.device)
    sign, log = torch.linalg.slogdet(unit)
    found = torch.where(sign > 0, (log / 2).exp(), 0)
    return found / (math.factorial(VERTICES - 1) * REGULAR)


def loss(points: Tensor, q_min: float = 0.5) -> Tensor:
    """Mean squared shortfall of the quality below `q_min`."""
    return (q_min - quality(points)).relu().square().mean()


def _gram(points: Tensor) -> Tensor:
    points = points.to(torch.promote_types(points.dtype, torch.float32))
    edges = points[..., 1:, :] - points[..., :1, :]
    return edges @ edges.mT


def _corners() -> Tensor:
    """Five points of a regular simplex of edge 1 about the origin, in four dimensions: (5, 4)."""
    unit = torch.eye(VERTICES, dtype=torch.float64) - 1 / VERTICES
    _, values, rows = torch.linalg.svd(unit)
    kept = values > 0.5
    return (unit @ rows[kept].mT / math.sqrt(2)).float()
