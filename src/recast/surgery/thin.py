"""Singular values of a product of thin factors, and the small matrices that re-factor it.

    s B A = U S V^T        B (O, r) = Qb Rb, A^T = Qa Ra        Rb Ra^T = P S Q^T  (r x r)

    B' = B Ra^T Q / sqrt(S) = U sqrt(S)        A' = P^T Rb A / sqrt(S) = sqrt(S) V^T

B' and A' need Rb and Ra alone, so neither Q is ever formed. All of it in fp64: a change that was
stored as a difference of large factors keeps its digits. Directions below DEAD of the factors'
norms are rounding, not change, and are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recast.errors import Refused
from recast.lowrank import LowRank

DEAD = 1e-13


@dataclass(frozen=True)
class Core:
    """Falling singular values (k,), and what makes balanced factors: up @ left, right @ down.

    left is (r, k), right (k, r), all in fp64; k is at most r and 0 for no change at all.
    """

    singular: Tensor
    left: Tensor
    right: Tensor

    def factors(self, up: Tensor, down: Tensor, kept: Tensor, scale: float = 1.0) -> LowRank:
        """Factors of the kept directions (indices) times a scale, in fp64."""
        root = abs(scale) ** 0.5
        sign = -root if scale < 0 else root
        new_up = up.double() @ (self.left[:, kept] * sign)
        new_down = (self.right[kept] * root) @ down.double().flatten(1)
        return LowRank(new_up, new_down.reshape(len(kept), *down.shape[1:]))


def core(up: Tensor, down: Tensor, scale: float = 1.0, *, name: str = "") -> Core:
    """The core of scale * up @ down; up (O, r), down (r, I[, kh, kw]).

    Raises Refused for NaN or infinity, naming the module.
    """
    b, a = up.double(), down.double().flatten(1).T
    if not (torch.isfinite(b.sum()) and torch.isfinite(a.sum())):
        raise Refused(f"{name} holds NaN or infinity; train or export it again.")
    rb, ra = _triangle(b), _triangle(a)
    p, s, qh = torch.linalg.svd(rb @ ra.T, full_matrices=False)
    alive = s > DEAD * torch.linalg.norm(rb) * torch.linalg.norm(ra)
    p, s, qh = p[:, alive], s[alive], qh[alive]
    root = s.sqrt()
    size = abs(scale) ** 0.5
    left = ra.T @ qh.T * (size / root) * (-1.0 if scale < 0 else 1.0)
    right = (size / root)[:, None] * (p.T @ rb)
    found = s * abs(scale)
    return Core(found, left, right) if scale else Core(found[:0], left[:, :0], right[:0])


def _triangle(tall: Tensor) -> Tensor:
    """R of a QR decomposition of an (m, r) matrix: (min(m, r), r), upper triangular."""
    packed, _ = torch.geqrf(tall)
    return packed[: tall.shape[1]].triu()


def overlaps(weight: Tensor, up: Tensor, down: Tensor, found: Core) -> Tensor:
    """|u_i^T W v_i| of a core's directions with the matrix they change, in fp64."""
    every = torch.arange(len(found.singular))
    own = found.factors(up, down, every)
    u = own.up / found.singular.sqrt()
    v = own.down.flatten(1) / found.singular.sqrt()[:, None]
    return ((v @ weight.double().flatten(1).T) * u.T).sum(1).abs()
