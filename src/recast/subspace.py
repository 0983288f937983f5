"""The leading eigenvectors of W W^T for a wide matrix W, by block Krylov iteration.

    K_d = span(X, G X, ..., G^(d-1) X)        G = W W^T

holds every polynomial of degree d - 1 in G, so of each direction the one that suits it best; the
leading eigenvectors are those of G projected on K_d (Musco & Musco, 2015, arXiv:1504.05477). The
basis of K_d is made orthonormal twice at every block: G squares the spread of the spectrum, and the
leading directions would else drown the others.

A block is narrower than the rank, which needs fewer columns in all for the same energy (Meyer,
Musco & Musco, 2024, arXiv:2305.02535).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

BLOCK = 16  # columns; narrower products leave the multipliers idle
LOOSE = 1e-2  # largest entry of Q^T Q - 1 that still counts as orthonormal


class Operator(Protocol):
    """G = W W^T, applied to the newest block of a basis. Bases and blocks are rows here."""

    def couple(self, basis: Tensor, block: int) -> Tensor:
        """G between the newest `block` rows and all rows of a basis (k, m): (block, k)."""

    def product(self) -> Tensor:
        """G times the rows that `couple` saw last: (block, m)."""


class Formed:
    """G itself, (m, m)."""

    def __init__(self, square: Tensor) -> None:
        self.square = square

    def couple(self, basis: Tensor, block: int) -> Tensor:
        self.image = basis[-block:] @ self.square
        return self.image @ basis.T

    def product(self) -> Tensor:
        return self.image


class Factored:
    """W (m, n) in bf16, applied twice; the couplings come from its images, Y = Q W, in fp32.

    Y Y^T and not (Y W^T) Q^T: the rounding of Y W^T is relative to sigma_1^2, that of a row of Y
    only to the singular values it holds, and a steep spectrum ends far below the first.
    """

    def __init__(self, wide: Tensor, most: int) -> None:
        self.rounded, self.work = wide.to(torch.bfloat16), wide.dtype
        self.images = wide.new_empty(most, wide.shape[1])

    def couple(self, basis: Tensor, block: int) -> Tensor:
        self.image = basis[-block:].to(torch.bfloat16) @ self.rounded
        newest = slice(len(basis) - block, len(basis))
        self.images[newest] = self.image
        return self.images[newest] @ self.images[: len(basis)].T

    def product(self) -> Tensor:
        return self.times(self.image)

    def times(self, rows: Tensor) -> Tensor:
        """Rows (b, n) times W^T."""
        return (rows.to(torch.bfloat16) @ self.rounded.T).to(self.work)


def random_block(columns: int, rank: int, like: Tensor) -> Tensor:
    """The rows that every search for a rank begins with: always the same numbers."""
    made = torch.Generator().manual_seed(0)
    return torch.randn(max(BLOCK, rank // 4), columns, generator=made).to(like)


def leading(
    operator: Operator, start: Tensor, rank: int, tolerance: float, most: int
) -> Tensor | None:
    """Orthonormal leading eigenvectors (m, rank), in falling order; None where it lost its way.

    start: (block, m). most: rows of the largest basis. Every half rank of rows the sum of the
    `rank` leading Ritz values is compared with the two before. The sums rise, and by less each
    time, so with gains g1 then g2 what is missing is about g2 (g2/g1 + (g2/g1)^2 + ...) =
    g2^2 / (g1 - g2), here at most g2; the search ends where that is within the tolerance, as a
    share of the sum.
    """
    block = len(start)
    stride = block * max(1, round(rank / 2 / block))
    basis, inner = start.new_empty(most, start.shape[1]), start.new_empty(most, most)
    sums: list[float] = []
    new = start
    for kept in range(block, most + 1, block):
        found = _orthonormal(new, basis[: kept - block])
        if found is None:
            return None
        basis[kept - block : kept] = found
        inner[kept - block : kept, :kept] = operator.couple(basis[:kept], block)
        if kept % stride == 0 and kept >= rank:
            ritz = torch.linalg.eigvalsh(inner[:kept, :kept])  # reads the lower triangle
            sums.append(ritz[-rank:].double().sum().item())
            if _missing(sums) <= tolerance * sums[-1]:
                return _ritz_vectors(basis[:kept], inner[:kept, :kept], rank)
        new = operator.product()
    return None


def _missing(sums: list[float]) -> float:
    """What the last sum still lacks, from the last two gains; infinite before there are two."""
    if len(sums) < 3:
        return float("inf")
    before, gain = sums[-2] - sums[-3], sums[-1] - sums[-2]
    return gain * min(1.0, gain / (before - gain)) if before > gain else gain


def _ritz_vectors(basis: Tensor, inner: Tensor, rank: int) -> Tensor | None:
    vectors = basis.T @ torch.linalg.eigh(inner)[1][:, -rank:].flip(1)
    error = vectors.T @ vectors
    error.diagonal().sub_(1)
    return vectors if error.abs().max().item() <= LOOSE else None


def _orthonormal(new: Tensor, basis: Tensor) -> Tensor | None:
    """Orthonormal rows that span what `new` adds to a basis; None where it adds too little.

    Gram-Schmidt against the basis and Cholesky QR of the block, twice, which is enough. Without
    rounding, G times a block overlaps with that block and the one before it alone, so those are
    all that the first round takes out; the second takes out the rest.
    """
    unit = torch.eye(len(new), dtype=new.dtype, device=new.device)
    for past in (basis[-2 * len(new) :], basis):
        if len(past):
            new = new - (new @ past.T) @ past
        lower, failed = torch.linalg.cholesky_ex(new @ new.T)
        if failed:
            return None
        new = torch.linalg.solve_triangular(lower, unit, upper=False) @ new
    return new if torch.isfinite(new.sum()) else None
