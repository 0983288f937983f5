"""A network becomes a denoiser: `split` its answer, and guide (Ho & Salimans 2022).

    x0 = x0_negative + scale (x0_positive - x0_negative), eps alike

Both are the same combination, so x = alpha x0 + sigma eps still holds and solvers need not know.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from recast.objective import Net, Objective

Denoiser = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(x, t) -> (x0, eps); t is (B,)."""

Split = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Met:
    """A state a sampler put to the network, and the (x0, eps) of its answers."""

    x: Tensor
    t: Tensor
    positive: Split
    negative: Split | None = None


def plain(net: Net, objective: Objective, *, met: list[Met] | None = None) -> Denoiser:
    """The network as a denoiser, without guidance; every state asked is appended to `met`."""

    def denoise(x: Tensor, t: Tensor) -> Split:
        answer = objective.split(x, net(x, t), t)
        if met is not None:
            met.append(Met(x, t, answer))
        return answer

    return denoise


def guided(
    net: Net, objective: Objective, scale: float, *, met: list[Met] | None = None
) -> Denoiser:
    """Classifier-free guidance in one network call per state.

    `net` is bound to 2 B conditions, the positive ones first; `in_turn` makes such a net of two
    when memory is short. Every state asked is appended to `met`.
    """

    def denoise(x: Tensor, t: Tensor) -> Split:
        xx, tt = torch.cat([x, x]), torch.cat([t, t])
        x0, eps = objective.split(xx, net(xx, tt), tt)
        (x0, x0_negative), (eps, eps_negative) = x0.chunk(2), eps.chunk(2)
        if met is not None:
            met.append(Met(x, t, (x0, eps), (x0_negative, eps_negative)))
        return torch.lerp(x0_negative, x0, scale), torch.lerp(eps_negative, eps, scale)

    return denoise


def in_turn(positive: Net, negative: Net) -> Net:
    """Two nets of B conditions as one of 2 B, called one after the other."""

    def both(x: Tensor, t: Tensor) -> Tensor:
        (x1, x2), (t1, t2) = x.chunk(2), t.chunk(2)
        return torch.cat([positive(x1, t1), negative(x2, t2)])

    return both
