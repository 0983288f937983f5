"""What a merge does to one tensor: pure functions of tensors and numbers, in fp32, rounded once.

    weighted      a + sum_i w_i (x_i - a)
    difference    a + w (b - c)
    slerp         sin((1 - w) th) / sin th a + sin(w th) / sin th b
                  th: the angle between a and b as vectors     Shoemake 1985, SIGGRAPH
    cosine        k a + (1 - k) b                    of a column j of the weight as a matrix (O, I)
                  k_j = clip(rise(c_j + c) - w, 0, 1)     rise: from 0 at the least to 1 at the most
                  c_j = cos(a_j, b_j), c the cosine of both matrices with columns of length 1
    ties          a + w mean of what is left of x_i - a after three steps
                  trim to the largest `density` of each; elect the sign of the sum; drop the others
                  Yadav et al. 2023, arXiv:2306.01708, section 3
    dare          a + sum_i w_i m_i (x_i - a) / density, m_i ~ Bernoulli(density)
                  Yu et al. 2023, arXiv:2311.03099, section 3.2
    dare-ties     ties of m_i (x_i - a) / density, nothing trimmed

cosine keeps a where the two agree and takes b where they do not. It is the idea of supermerger's
cosineA, known by use and not by a paper; there `rise` is over all tensors of a model, here over the
columns of one (of a bias, which is one column, 1), so that no first pass over the files is needed,
and the numbers differ. TIES trims
here tensor by tensor, as the tools in use do; the paper trims over the whole model.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

Numbers = Sequence[float]
SCALARS = 1e-12


def weighted(a: Tensor, others: Sequence[Tensor], weights: Numbers) -> Tensor:
    """a plus weighted differences of others to it; of one other, its bits at weight 1."""
    if len(others) == 1:
        return torch.lerp(a, others[0], weights[0])
    total = a.clone()
    for x, weight in zip(others, weights, strict=True):
        total += weight * (x - a)
    return total


def difference(a: Tensor, others: Sequence[Tensor], weights: Numbers) -> Tensor:
    """a plus w times what b has and c has not."""
    b, c = others
    return a + weights[0] * (b - c)


def slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """Between a and b on the arc; the straight line where they are parallel or one is zero."""
    wide_a, wide_b = a.double().flatten(), b.double().flatten()
    norms = wide_a.norm() * wide_b.norm()
    cos = float((wide_a @ wide_b / norms).clamp(-1, 1)) if norms > 0 else 1.0
    angle = math.acos(cos)
    if math.sin(angle) < 1e-6:
        return torch.lerp(a, b, weight)
    first, second = math.sin((1 - weight) * angle), math.sin(weight * angle)
    return (first * a + second * b) / math.sin(angle)


def cosine(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """a where the columns of both agree, b where they do not; a larger weight takes more of b."""
    one, other = a.reshape(-1, math.prod(a.shape[1:])), b.reshape(-1, math.prod(b.shape[1:]))
    u, v = (x / x.norm(dim=0).clamp_min(SCALARS) for x in (one, other))
    each = (u * v).sum(0)
    whole = (u * v).sum() / (u.norm() * v.norm()).clamp_min(SCALARS)
    seen = (each + whole) / 2
    spread = seen.max() - seen.min()
    rise = (seen - seen.min()) / spread if spread > SCALARS else torch.ones_like(seen)
    kept = (rise - weight).clamp(0, 1)
    return (other + kept * (one - other)).reshape(a.shape)


def trimmed(delta: Tensor, density: float) -> Tensor:
    """The largest values of a change, a share of them; zeros for the others."""
    count = math.ceil(density * delta.numel())
    if count >= delta.numel():
        return delta
    flat = delta.flatten()
    kept = flat.abs().topk(count, sorted=False).indices
    return torch.zeros_like(flat).scatter_(0, kept, flat[kept]).reshape(delta.shape)


def elected(deltas: Sequence[Tensor]) -> Tensor:
    """The mean of the values that have the sign of their sum; zeros do not count."""
    sign = torch.zeros_like(deltas[0])
    for delta in deltas:
        sign += delta
    sign.sign_()
    total, count = torch.zeros_like(sign), torch.zeros_like(sign)
    for delta in deltas:
        agrees = (delta.sign() == sign) & (delta != 0)
        total += torch.where(agrees, delta, 0)
        count += agrees
    return total / count.clamp_min(1)


def ties(a: Tensor, others: Sequence[Tensor], weight: float, density: float) -> Tensor:
    """TIES-Merging onto a."""
    return a + weight * elected([trimmed(x - a, density) for x in others])


def dropped(delta: Tensor, density: float, seed: int) -> Tensor:
    """A random share of a change, larger by what is missing; the same for the same seed."""
    made = torch.Generator().manual_seed(seed)
    kept = torch.rand(delta.shape, generator=made) < density
    return torch.where(kept, delta / density, 0)


def dare(
    a: Tensor, others: Sequence[Tensor], weights: Numbers, density: float, seeds: Sequence[int]
) -> Tensor:
    """DARE onto a: the sum of what is not dropped."""
    total = a.clone()
    for x, weight, seed in zip(others, weights, seeds, strict=True):
        total += weight * dropped(x - a, density, seed)
    return total


def dare_ties(
    a: Tensor, others: Sequence[Tensor], weight: float, density: float, seeds: Sequence[int]
) -> Tensor:
    """DARE with TIES' election of signs."""
    left = [dropped(x - a, density, seed) for x, seed in zip(others, seeds, strict=True)]
    return a + weight * elected(left)


def seed_of(seed: int, model: int, key: str) -> int:
    """The seed of one tensor of one model, whatever the order in which tensors come."""
    text = f"{seed} {model} {key}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:7], "little")
