"""From noise to data: solvers as generators over one denoiser signature.

    denoise(x, t) -> (x0, eps)                what the network believes x is made of
    dx = x0 d(alpha) + eps d(sigma)           the probability-flow ODE, on every path

Nothing here knows what the network predicts, or on which path. Primes mark the end of a step:

    lambda = log(alpha/sigma)                 half the log-SNR (Lu et al. 2022b)
    h      = lambda' - lambda                 the length of a step
    fade   = e^-h = (sigma' alpha) / (alpha' sigma)

`fade` is what every formula below is written in. It is 0 both for a step that begins in pure noise
(alpha = 0, h infinite) and for one that ends in data (sigma' = 0), so neither needs a special case.

Each solver yields x after every step; the last x, at t = 0, is the sample.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Protocol

import torch
from torch import Generator, Tensor

from recast.errors import Refused
from recast.objective import Path
from recast.sample.guidance import Denoiser

Generators = Sequence[Generator] | Generator | None
"""Where fresh noise comes from; one CPU generator per image makes it independent of the batch."""


class Solver(Protocol):
    def __call__(
        self,
        denoise: Denoiser,
        path: Path,
        x: Tensor,
        times: Tensor,
        *,
        generator: Generators = None,
    ) -> Iterator[Tensor]:
        """x (B, ...) at times[0]; times (steps + 1,) falling strictly, usually to 0."""


@dataclass(frozen=True)
class Point:
    t: float
    alpha: float
    sigma: float

    def at(self, x: Tensor) -> Tensor:
        """t as the denoiser wants it: (B,), at least float32."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        return torch.full((len(x),), self.t, dtype=dtype, device=x.device)


def steps(path: Path, times: Tensor) -> Iterator[tuple[Point, Point]]:
    """(here, there) for every step, in float64 whatever the images are in."""
    times = times.detach().to("cpu", torch.float64)
    if not (times.diff() < 0).all():
        raise Refused("sampling times must fall strictly: use recast.timesteps.grid to make them")
    alpha, sigma = path(times)
    points = [
        Point(*each) for each in zip(*(v.tolist() for v in (times, alpha, sigma)), strict=True)
    ]
    yield from pairwise(points)


def fading(here: Point, there: Point) -> float:
    """e^-h: how much of the noise ratio sigma/alpha is left after the step."""
    return there.sigma * here.alpha / (there.alpha * here.sigma)


def ddim(
    denoise: Denoiser,
    path: Path,
    x: Tensor,
    times: Tensor,
    *,
    generator: Generators = None,
    eta: float = 0.0,
) -> Iterator[Tensor]:
    """DDIM (Song et al. 2021, eq. 12): compose the sample anew from x0 and eps, one step cleaner.

    Euler's method for the ODE above, exactly: in k-diffusion's coordinates x/alpha it is their
    `sample_euler`, on the linear path it is x + (t' - t)(eps - x0). With eta, part of eps is
    exchanged for fresh noise: eta = 1 is ancestral sampling, their `sample_euler_ancestral`.
    """
    for here, there in steps(path, times):
        x0, eps = denoise(x, here.at(x))
        fresh = eta * math.sqrt(1 - fading(here, there) ** 2)
        x = there.alpha * x0 + there.sigma * math.sqrt(1 - fresh**2) * eps
        if there.sigma * fresh > 0:
            x = x + there.sigma * fresh * noise(x, generator)
        yield x


def heun(
    denoise: Denoiser,
    path: Path,
    x: Tensor,
    times: Tensor,
    *,
    generator: Generators = None,
) -> Iterator[Tensor]:
    """The trapezoid rule for dx = x0 d(alpha) + eps d(sigma); two calls a step, one in the last.

    Karras et al. 2022, algorithm 1, where alpha is constant; Heun's rule for the velocity eps - x0
    on the linear path; regular where alpha starts at 0, which no rule in x/alpha can be.
    """
    for here, there in steps(path, times):
        x0, eps = denoise(x, here.at(x))
        ahead = there.alpha * x0 + there.sigma * eps
        if there.sigma > 0:
            x0_ahead, eps_ahead = denoise(ahead, there.at(x))
            d_alpha, d_sigma = there.alpha - here.alpha, there.sigma - here.sigma
            ahead = x + d_alpha * (x0 + x0_ahead) / 2 + d_sigma * (eps + eps_ahead) / 2
        x = ahead
        yield x


def dpmpp_2m(
    denoise: Denoiser,
    path: Path,
    x: Tensor,
    times: Tensor,
    *,
    generator: Generators = None,
    eta: float = 0.0,
) -> Iterator[Tensor]:
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2), its SDE form for eta > 0 (eq. 14).

    x' = sigma'/sigma kept x + alpha' (1 - fade kept) D + sigma' sqrt(1 - kept^2) z
    D  = x0 + h / (2 h_before) (x0 - x0_before)                    kept = e^(-eta h)

    k-diffusion's `sample_dpmpp_2m` and, for eta = 1, `sample_dpmpp_2m_sde` (midpoint). First order
    in the first step, after a start in pure noise (h_before is infinite) and into data.
    """
    x0_before, h_before = None, math.inf
    for here, there in steps(path, times):
        x0, _ = denoise(x, here.at(x))
        fade = fading(here, there)
        kept, h = fade**eta, -math.log(fade) if fade else math.inf
        better = x0
        if x0_before is not None and h < math.inf:
            better = x0 + h / (2 * h_before) * (x0 - x0_before)
        x = there.sigma / here.sigma * kept * x + there.alpha * (1 - fade * kept) * better
        if there.sigma > 0 and kept < 1:
            x = x + there.sigma * math.sqrt(1 - kept**2) * noise(x, generator)
        x0_before, h_before = x0, h
        yield x


def dpmpp_2s_ancestral(
    denoise: Denoiser,
    path: Path,
    x: Tensor,
    times: Tensor,
    *,
    generator: Generators = None,
    eta: float = 1.0,
) -> Iterator[Tensor]:
    """DPM-Solver++(2S) with ancestral noise, as k-diffusion's `sample_dpmpp_2s_ancestral`.

    Aim below the step's end, at sigma' sqrt(1 - fresh^2), by way of the midpoint in lambda, and add
    the missing noise. Where the aim is data, or the start pure noise, lambda has no midpoint and
    one call does: the ancestral DDIM step.
    """
    for here, there in steps(path, times):
        x0, eps = denoise(x, here.at(x))
        fade = fading(here, there)
        fresh = eta * math.sqrt(1 - fade**2)
        old = math.sqrt(1 - fresh**2)
        if fade * old > 0:
            half = math.sqrt(fade * old)
            middle = midpoint(path, here, half)
            between = middle.alpha * (half / here.alpha * x + (1 - half) * x0)
            x0, _ = denoise(between, middle.at(x))
            x = there.alpha * (fade * old / here.alpha * x + (1 - fade * old) * x0)
        else:
            x = there.alpha * x0 + there.sigma * old * eps
        if there.sigma * fresh > 0:
            x = x + there.sigma * fresh * noise(x, generator)
        yield x


def midpoint(path: Path, here: Point, fade: float) -> Point:
    """The point of the path whose sigma/alpha is `fade` times that of `here`."""
    t = path.time(
        torch.tensor(here.alpha, dtype=torch.float64),
        torch.tensor(here.sigma * fade, dtype=torch.float64),
    )
    alpha, sigma = path(t)
    return Point(t.item(), alpha.item(), sigma.item())


def noise(x: Tensor, generator: Generators) -> Tensor:
    """Standard normal like x, drawn in float32 on the CPU so that the device does not matter."""
    if generator is None or isinstance(generator, Generator):
        return torch.randn(x.shape, generator=generator, dtype=torch.float32).to(x)
    rows = [torch.randn(x.shape[1:], generator=g, dtype=torch.float32) for g in generator]
    return torch.stack(rows).to(x)


SOLVERS: dict[str, Solver] = {
    "euler": ddim,
    "ddim": ddim,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "euler_ancestral": partial(ddim, eta=1.0),
    "dpmpp_2s_ancestral": dpmpp_2s_ancestral,
    "dpmpp_2m_sde": partial(dpmpp_2m, eta=1.0),
}


def find_solver(name: str) -> Solver:
    """The solver of that name; Refused, with the names there are, if there is none."""
    if name not in SOLVERS:
        raise Refused(f"no solver {name!r}: choose one of {', '.join(SOLVERS)}")
    return SOLVERS[name]
