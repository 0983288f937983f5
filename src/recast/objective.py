"""What a diffusion network predicts: a path and a pair of coefficients.

    x = alpha(t) x0 + sigma(t) eps          path         t in [0, 1]: 0 = data, 1 = noise
    output = a x0 + b eps                   prediction   (a, b) from (alpha, sigma)

Two equations in two unknowns. `target` evaluates the second, `split` solves both; the determinant
is alpha b - sigma a. On a variance-preserving path it is 1 for v, on the linear path 1 for flow.

Every path is the same family of noisy samples up to scale, indexed by sigma/alpha (Karras et al.
2022, section 2; Kingma & Gao 2023). So one network can answer for any other objective: `carry` its
input to the path it was trained on, `split` the answer, take the other `target`. `express` is that
sentence.

Letters, here and in every file that imports this one: x0 data, eps noise, x noisy sample, t time,
alpha and sigma the path's coefficients. Nothing else in this package knows eps, v or flow by name.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from recast.errors import Refused

Net = Callable[[Tensor, Tensor], Tensor]
"""(x, t) -> output, with the conditioning already bound; t is (B,)."""


class Path(Protocol):
    """How data turns into noise: coefficients, their inverse, and the number a network is told."""

    @property
    def floor(self) -> float:
        """The smallest t at which a network of this path was trained."""

    @property
    def spacing(self) -> str:
        """The sampling grid to use unless told otherwise: a row of `timesteps.SPACINGS`."""

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at t, each of t's shape and precision."""

    def time(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The t whose sigma/alpha is the given one; by ratio only, finite at alpha = 0.

        A noisier sample than the path has gets t = 1; ask `covers` where that matters.
        """

    def covers(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Whether the path reaches this much noise, as a bool tensor."""

    def embed(self, t: Tensor) -> Tensor:
        """The number the network's time embedding is given; real, never floored."""


@dataclass(frozen=True)
class Linear:
    """Rectified flow: alpha = 1 - t, sigma = t, the network is told 1000 t (ComfyUI, diffusers)."""

    floor: float = field(default=0.0, init=False)
    spacing: str = field(default="trailing", init=False)

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t

    def time(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return sigma / (alpha + sigma)

    def covers(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return torch.ones_like(sigma, dtype=torch.bool)

    def embed(self, t: Tensor) -> Tensor:
        return 1000 * t


@dataclass(frozen=True)
class Discrete:
    """Stable Diffusion's 1000 steps as points on the unit circle: alpha, sigma = cos, sin(angle).

    Step k lies at t = (k + 1)/1000 and t = 0 is the data itself, so that a sampler may end at t = 0
    like on any other path. Between two steps the angle is linear in t; the network is told
    k = 1000 t - 1, and 0 below the first step, which no network was trained on.

    `zero_snr` shifts and scales alpha so that the last step is pure noise and the first stays (Lin
    et al. 2024, algorithm 1). Angles make that no special case.
    """

    zero_snr: bool = False

    @property
    def floor(self) -> float:
        return 1 / STEPS

    @property
    def spacing(self) -> str:
        return "trailing" if self.zero_snr else "normal"

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        position = t * STEPS
        i = position.detach().floor().clamp(0, STEPS - 1).long()
        to_data, to_noise = _angles(self.zero_snr, t.dtype, t.device)
        part = position - i
        theta = torch.lerp(to_data[i], to_data[i + 1], part)
        phi = torch.lerp(to_noise[i], to_noise[i + 1], part)
        return phi.sin(), theta.sin()

    def time(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        theta = torch.atan2(sigma, alpha)
        nodes, _ = _angles(self.zero_snr, theta.dtype, theta.device)
        theta = theta.clamp(max=nodes[-1]).contiguous()
        i = (torch.searchsorted(nodes, theta, right=True) - 1).clamp(0, STEPS - 1)
        return (i + (theta - nodes[i]) / (nodes[i + 1] - nodes[i])) / STEPS

    def covers(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        last_alpha, last_sigma = self(torch.ones((), dtype=sigma.dtype, device=sigma.device))
        return alpha * last_sigma >= sigma * last_alpha

    def embed(self, t: Tensor) -> Tensor:
        return (STEPS * t - 1).clamp(min=0)


STEPS = 1000


@lru_cache(maxsize=16)
def _angles(zero_snr: bool, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The angle from the data axis and the one from the noise axis, (1001,) each, at t = k/1000.

    Both are kept because each is exact only near its own end. The betas are Stable Diffusion's
    "scaled linear" ones, 0.00085 to 0.012.
    """
    beta = torch.linspace(math.sqrt(0.00085), math.sqrt(0.012), STEPS, dtype=torch.float64) ** 2
    alpha = (1 - beta).cumprod(0).sqrt()
    if zero_snr:
        alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    alpha = torch.cat([torch.ones(1, dtype=torch.float64), alpha])
    sigma = ((1 - alpha) * (1 + alpha)).sqrt()
    to_data, to_noise = torch.atan2(sigma, alpha), torch.atan2(alpha, sigma)
    return to_data.to(device, dtype), to_noise.to(device, dtype)


@dataclass(frozen=True)
class Objective:
    """A path and what the network predicts on it.

    Tensors may be half precision; coefficients, and so all results, are at least float32. Times
    are scalars or (B,). Raises Refused for a prediction that cannot be solved at t = 1, such as eps
    on a path that ends in pure noise, where eps is the input and the data is anyone's guess.
    """

    name: str
    path: Path
    predicts: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

    def __post_init__(self) -> None:
        alpha, sigma = self.path(torch.ones((), dtype=torch.float64))
        a, b = self.predicts(alpha, sigma)
        if alpha * b == sigma * a:
            raise Refused(
                f"objective {self.name!r} says nothing about the data at pure noise, where its path"
                " ends: choose v-zsnr or flow for a path with zero terminal SNR"
            )

    def noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The noisy sample at t."""
        alpha, sigma = levels(self.path, t, x0)
        return alpha * x0 + sigma * eps

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the network should answer at t."""
        a, b = self.predicts(*levels(self.path, t, x0))
        return a * x0 + b * eps

    def split(self, x: Tensor, output: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The (x0, eps) that the network's answer claims.

        At t = 0 exactly an x0 network leaves eps open (0/0); samplers never ask there.
        """
        alpha, sigma = levels(self.path, t, x)
        a, b = self.predicts(alpha, sigma)
        det = alpha * b - sigma * a
        return (b * x - sigma * output) / det, (alpha * output - a * x) / det


def levels(path: Path, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) at t, shaped to multiply `like` (B, ...) and never below float32."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    shape = (-1,) + (1,) * (like.ndim - 1)
    t = t.to(like.device, torch.promote_types(t.dtype, dtype))
    alpha, sigma = path(t)
    return alpha.to(dtype).reshape(shape), sigma.to(dtype).reshape(shape)


def slopes(path: Path, x: Tensor, x0: Tensor, eps: Tensor, t: Tensor) -> dict[str, float]:
    """How much of its "data" alpha x0 and its "noise" sigma eps is in x, regressed together.

    1 and 1 where x was noised along the path. Samples wholly at one end have the other's only.
    """
    alpha, sigma = levels(path, t, x0.double())
    parts = [(alpha * x0.double()).flatten(), (sigma * eps.double()).flatten()]
    columns = torch.stack(parts, 1)
    gram, moments = columns.T @ columns, columns.T @ x.double().flatten()
    present = gram.diagonal() > 1e-12 * gram.diagonal().max()
    found = torch.linalg.solve(gram[present][:, present], moments[present])
    names = [n for n, p in zip(("data", "noise"), present.tolist(), strict=True) if p]
    return dict(zip(names, found.tolist(), strict=True))


def start(path: Path, eps: Tensor, t: float = 1.0) -> Tensor:
    """The sample to begin with: noise at the strength of t and no data.

    On every path the same eps is the same start (`carry` maps one to the other), which is what
    makes two models' images comparable; k-diffusion's sigma_max eps is this divided by alpha(1).
    """
    _, sigma = levels(path, torch.tensor(t, dtype=torch.float64), eps)
    return sigma * eps


def retime(t: Tensor, source: Path, target: Path) -> Tensor:
    """The time on `target` with the signal-to-noise ratio that t has on `source`."""
    if source == target:
        return t
    return target.time(*source(t.to(torch.promote_types(t.dtype, torch.float32))))


def carry(x: Tensor, t: Tensor, source: Path, target: Path) -> tuple[Tensor, Tensor]:
    """The same noisy sample on another path: (x', t') with the same sigma/alpha.

    Where `target` does not reach that much noise, x is taken for pure noise, (sigma'/sigma) x at
    t' = 1; the two rules meet where the path ends.
    """
    if source == target:
        return x, t
    there = retime(t.to(torch.promote_types(t.dtype, x.dtype)), source, target)
    alpha, sigma = levels(source, t, x)
    new_alpha, new_sigma = levels(target, there, x)
    noisy = target.covers(alpha, sigma).logical_not()
    # At sigma = 0 the second ratio is not used; 1 keeps it finite.
    as_noise = new_sigma / torch.where(noisy, sigma, 1)
    return torch.where(noisy, as_noise, (new_alpha + new_sigma) / (alpha + sigma)) * x, there


def express(net: Net, source: Objective, target: Objective) -> Net:
    """A network trained for `source` that answers as if it had been trained for `target`.

    Exact wherever the source's path reaches. Above it the network is asked at its own noisiest time
    with x taken for noise; its x0 is kept, and eps is what x then leaves: (x - alpha x0) / sigma.
    """
    if source == target:
        return net

    def expressed(x: Tensor, t: Tensor) -> Tensor:
        there, time = carry(x, t, target.path, source.path)
        x0, eps = source.split(there, net(there, time), time)
        alpha, sigma = levels(target.path, t, x)
        noisy = source.path.covers(alpha, sigma).logical_not()
        eps = torch.where(noisy, (x - alpha * x0) / torch.where(noisy, sigma, 1), eps)
        return target.target(x0, eps, t)

    return expressed


def _zero(level: Tensor) -> Tensor:
    return torch.zeros_like(level)


def _one(level: Tensor) -> Tensor:
    return torch.ones_like(level)


EPS = Objective("eps", Discrete(), lambda alpha, sigma: (_zero(alpha), _one(alpha)))
X0 = Objective("x0", Discrete(), lambda alpha, sigma: (_one(alpha), _zero(alpha)))
V = Objective("v", Discrete(), lambda alpha, sigma: (-sigma, alpha))
V_ZSNR = Objective("v-zsnr", Discrete(zero_snr=True), V.predicts)
FLOW = Objective("flow", Linear(), lambda alpha, sigma: (-_one(alpha), _one(alpha)))

OBJECTIVES = {each.name: each for each in (EPS, V, V_ZSNR, FLOW, X0)}
