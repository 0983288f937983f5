"""Low-rank factors of one weight: factorise, truncate, subtract.

A weight W is (O, I) or (O, I, kh, kw) and is treated as the matrix (O, I*kh*kw).

    W = U S V^T      up = U_r sqrt(S_r)      down = sqrt(S_r) V_r^T      (balanced)

`exact` takes U or V from the eigenvectors of the fp32 Gram matrix of the short side, `fast` from a
Krylov iteration in bf16; the other factor is always a projection of W itself in fp32, so a slightly
rotated subspace costs captured energy and never exactness. Factors are not clamped.

The difference of two products is never formed as B A - B0 A0, which cancels:

    B A - B0 A0 = [B - B0 | B0] [A ; A - A0]
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from recast.errors import Refused
from recast.subspace import BLOCK, Factored, Formed, leading, random_block


@dataclass(frozen=True)
class LowRank:
    """The product up @ down: up is (O, r), down is (r, I) or (r, I, kh, kw)."""

    up: Tensor
    down: Tensor

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that the product stands for."""
        return (self.up.shape[0], *self.down.shape[1:])

    def dense(self, shape: tuple[int, ...] | torch.Size | None = None) -> Tensor:
        """Multiply out in fp32 (fp64 for fp64 factors)."""
        work = torch.promote_types(self.up.dtype, torch.float32)
        product = self.up.to(work) @ self.down.to(work).flatten(1)
        return product.reshape(self.shape if shape is None else shape)

    def to(self, dtype: torch.dtype) -> LowRank:
        """Round both factors to a dtype."""
        return LowRank(self.up.to(dtype), self.down.to(dtype))


@dataclass(frozen=True)
class Full:
    """A change of every entry of one parameter: delta has the parameter's shape."""

    delta: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.delta.shape)

    def dense(self, shape: tuple[int, ...] | torch.Size | None = None) -> Tensor:
        """The delta in fp32 (fp64 stays)."""
        work = self.delta.to(torch.promote_types(self.delta.dtype, torch.float32))
        return work if shape is None else work.reshape(shape)

    def to(self, dtype: torch.dtype) -> Full:
        """Round to a dtype."""
        return Full(self.delta.to(dtype))


Chooser = Callable[[Tensor], int]  # all singular values, falling -> the rank to keep


def factorize(
    weight: Tensor,
    rank: int | Chooser,
    *,
    method: str = "exact",
    name: str = "",
    tally: Counter[str] | None = None,
) -> LowRank:
    """Best rank-r factors of a weight, in fp32, balanced, with deterministic signs.

    rank: a number, or what finds one in the singular values; that takes the exact method. A
    direction without energy has a zero column in `up` and a unit row in `down`, so it can still
    learn; beyond the short side both are zero, so that r is the same for every layer of a file.
    tally counts what was done: "exact" and "fast", and why fast could not, "small" or "untrusted".
    Raises Refused for a rank below 1 and for NaN or infinity, naming the tensor.
    """
    if isinstance(rank, int) and rank < 1:
        raise Refused(f"rank {rank} was asked for {_called(name)}; give a rank of at least 1.")
    matrix, scale = _prepared(weight, name)
    short_is_rows = matrix.shape[0] <= matrix.shape[1]
    wide = matrix if short_is_rows else matrix.T
    tally = Counter() if tally is None else tally
    if isinstance(rank, int):
        basis = METHODS[method](wide, min(rank, *matrix.shape), tally)
    else:
        values, vectors = torch.linalg.eigh(gram(wide))
        rank = max(1, rank(values.clamp_min(0).sqrt().flip(0) * scale))
        basis = vectors.flip(1)[:, :rank]
        tally["exact"] += 1
    up, down = _balanced(matrix, basis, short_is_rows)
    root = scale**0.5
    up, down = _padded(up * root, 1, rank), _padded(down * root, 0, rank)
    return LowRank(up, down.reshape(rank, *weight.shape[1:]))


def spectrum(weight: Tensor, *, name: str = "") -> Tensor:
    """All singular values of a weight, falling, fp32; below 3e-4 of the first they are noise."""
    matrix, scale = _prepared(weight, name)
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    return torch.linalg.eigvalsh(gram(tall.T)).clamp_min(0).sqrt().flip(0) * scale


def energy(weight: Tensor, factors: LowRank) -> float:
    """Share of the squared norm of a weight that the product holds (1 for a zero weight)."""
    whole = weight.double().square().sum().item()
    rest = (weight.float() - factors.dense(weight.shape)).double().square().sum().item()
    return 1.0 if whole == 0 else 1.0 - rest / whole


def rank_for_energy(singular: Tensor, share: float) -> int:
    """Smallest rank whose leading singular values hold the given share of the squared norm."""
    squares = singular.double().square()
    reached = squares.cumsum(0) >= share * squares.sum() * (1 - 1e-12)
    return int(reached.float().argmax().item()) + 1


def truncate(factors: LowRank, rank: int | Chooser | None) -> LowRank:
    """Re-factor a product to a rank by QR of the thin factors and a small SVD (None: keep r).

    rank may be what finds one in the singular values; 0 is allowed then. Works in fp64 and returns
    fp32 balanced factors, zero-padded to a rank that was given as a number.
    """
    rank = factors.rank if rank is None else rank
    if isinstance(rank, int) and rank < 1:
        raise Refused(f"rank {rank} was asked for a low-rank change; give a rank of at least 1.")
    left, upper = torch.linalg.qr(factors.up.double())
    right, lower = torch.linalg.qr(factors.down.double().flatten(1).T)
    u, s, vh = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    if not isinstance(rank, int):
        rank = min(rank(s), len(s))
    kept = min(rank, len(s))
    root = s[:kept].sqrt()
    up, down = left @ u[:, :kept] * root, root[:, None] * (vh[:kept] @ right.T)
    if kept:
        up, down = _signed(up, down)
    up, down = _padded(up, 1, rank).float(), _padded(down, 0, rank).float()
    return LowRank(up, down.reshape(rank, *factors.down.shape[1:]))


def squared_norm(factors: LowRank) -> float:
    """Sum of the squares of a product's entries, from the thin factors."""
    up, down = factors.up.double(), factors.down.double().flatten(1)
    return ((up.T @ up) * (down @ down.T)).sum().item()


def difference(trained: LowRank, initial: LowRank) -> LowRank:
    """The product of rank r + r0 that equals trained - initial, without cancellation.

    [B - B0 | B0] [A ; A - A0]; with other ranks there is no shared start, so [B | -B0] [A ; A0].
    """
    b, a = trained.up.float(), trained.down.float()
    b0, a0 = initial.up.float(), initial.down.float()
    if trained.rank != initial.rank:
        return LowRank(torch.cat([b, -b0], 1), torch.cat([a, a0]))
    return LowRank(torch.cat([b - b0, b0], 1), torch.cat([a, a - a0]))


def subtract(trained: LowRank, initial: LowRank, rank: int | None = None) -> LowRank:
    """Factors of trained - initial, re-factored; rank None keeps 2r, which is exact."""
    return truncate(difference(trained, initial), rank)


def _exact(wide: Tensor, rank: int, tally: Counter[str]) -> Tensor:
    """Leading left singular vectors (m, r) of a wide (m, n) matrix, from its fp32 Gram matrix.

    At ranks far below m by Krylov iteration until CERTAIN, else from all eigenvectors.
    """
    tally["exact"] += 1
    square = gram(wide)
    if 10 * (rank + BLOCK) < len(wide) and square.dtype == torch.float32:
        start = random_block(len(square), rank, square) @ square
        found = leading(Formed(square), start, rank, CERTAIN, len(square) // 2)
        if found is not None:
            return found
    return torch.linalg.eigh(square)[1][:, -rank:].flip(1)


def _fast(wide: Tensor, rank: int, tally: Counter[str]) -> Tensor:
    """As _exact up to 0.5 % of the energy: Krylov iteration in bf16 where it pays and converges."""
    found = None
    pays = 6 * (rank + BLOCK) < len(wide)
    if pays:
        columns = len(wide) * 3 // 4
        weight = Factored(wide, columns)
        start = weight.times(random_block(wide.shape[1], rank, wide))
        found = leading(weight, start, rank, CLOSE, columns)
    if found is None:
        tally["untrusted" if pays else "small"] += 1
        return _exact(wide, rank, tally)
    tally["fast"] += 1
    return found


CLOSE, CERTAIN = 2.5e-3, 4e-7  # shares of the energy that may be missing, as far as can be seen
BLOCKS = 4
ORDINARY = 2.0**-12  # the fourth power of a peak between this and its inverse has room in fp32
METHODS: dict[str, Callable[[Tensor, int, Counter[str]], Tensor]] = {"exact": _exact, "fast": _fast}


def _balanced(matrix: Tensor, basis: Tensor, rows: bool) -> tuple[Tensor, Tensor]:
    """Split the projection of a matrix on a basis of its short side into balanced factors."""
    projected = basis.T @ matrix if rows else (matrix @ basis).T
    length = projected.norm(dim=1)
    order = length.argsort(descending=True, stable=True)
    basis, projected, length = basis[:, order], projected[order], length[order]
    # At rounding level there is no direction, only noise: `up` is zero there, `down` a unit row.
    empty = length <= 4 * torch.finfo(length.dtype).eps * length[0]
    root = torch.where(empty, torch.ones_like(length), length).sqrt()
    if rows:
        up, down = basis * root, projected / root[:, None]
        down = torch.where(empty[:, None], _unit_rows(down), down)
    else:
        up, down = projected.T / root, basis.T * root[:, None]
    return _signed(up.masked_fill(empty, 0), down)


def _unit_rows(like: Tensor) -> Tensor:
    """Row k is the k-th unit vector: a fixed choice where the matrix prefers no direction."""
    rows = torch.zeros_like(like)
    return rows.fill_diagonal_(1)


def _signed(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Make the largest entry of every row of `down` positive."""
    peak = down.gather(1, down.abs().argmax(1, keepdim=True))
    sign = torch.where(peak < 0, -1.0, 1.0).to(down.dtype)
    return up * sign.T, down * sign


def _prepared(weight: Tensor, name: str) -> tuple[Tensor, float]:
    """The weight as an fp32 matrix, over a power of two where its squares would vanish or end."""
    if weight.ndim < 2 or weight.numel() == 0:
        raise Refused(
            f"{_called(name)} has shape {tuple(weight.shape)}; only matrices and "
            "convolutions have low-rank factors."
        )
    matrix = weight.detach().to(torch.promote_types(weight.dtype, torch.float32)).flatten(1)
    low, high = (bound.item() for bound in torch.aminmax(matrix))
    peak = max(-low, high)
    if not math.isfinite(peak):
        raise Refused(f"{_called(name)} holds NaN or infinity; repair the checkpoint first.")
    scale = 1.0 if peak == 0 or ORDINARY < peak < 1 / ORDINARY else 2.0 ** math.frexp(peak)[1]
    return (matrix if scale == 1 else matrix / scale), scale


def gram(wide: Tensor) -> Tensor:
    """wide @ wide.T in blocks of rows, of which only those on and above the diagonal are computed.

    Saves 3 products of 8 of a large matrix; the result is symmetric to the bit.
    """
    side = len(wide)
    step = -(-side // BLOCKS) if side >= 256 else side
    result = wide.new_empty(side, side)
    for first in range(0, side, step):
        rows = slice(first, first + step)
        result[rows, first:] = wide[rows] @ wide[first:].T
        result[first + step :, rows] = result[rows, first + step :].T
    return result


def _padded(factor: Tensor, axis: int, rank: int) -> Tensor:
    missing = rank - factor.shape[axis]
    if missing == 0:
        return factor.contiguous()
    shape = (factor.shape[0], missing) if axis == 1 else (missing, factor.shape[1])
    return torch.cat([factor.contiguous(), factor.new_zeros(shape)], axis)


def _called(name: str) -> str:
    return f"tensor {name}" if name else "a tensor"
