"""Where on the path: times to train at, and grids of times to sample on.

    shift       t -> s t / (1 + (s - 1) t)      on the linear path: sigma/alpha times s
    spacings    N steps are N + 1 times from 1 (noise) down to 0 (data)

A time is both the noise level and what the network is told, through the path alone; so a shift
moves the two together, whether it is applied to a draw or to a grid.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

from recast.errors import Refused
from recast.objective import Path

Draw = Callable[..., Tensor]
"""(n, *, generator, **options) -> (n,) float32 on the CPU, strictly between 0 and 1."""

EDGE = 2.0**-20
"""How near a draw may come to 0 and 1, where a prediction may be undefined."""


def shift(t: Tensor, s: float) -> Tensor:
    """Times moved towards noise (s > 1) or data (s < 1); 0 and 1 stay (Esser et al. 2024, eq. 23).

    Raises Refused unless s is positive.
    """
    if not s > 0:
        raise Refused(f"shift {s} is not positive: 1 leaves the times alone, 3 is usual for flow")
    return s * t / (1 + (s - 1) * t)


def uniform(n: int, generator: Generator | None = None) -> Tensor:
    """Every time alike."""
    return _inside(torch.rand(n, generator=generator))


def logit_normal(
    n: int, mean: float = 0.0, std: float = 1.0, generator: Generator | None = None
) -> Tensor:
    """The sigmoid of a normal variable, mostly mid-path (Esser et al. 2024, eq. 19)."""
    return _inside(torch.sigmoid(mean + std * torch.randn(n, generator=generator)))


def stratified(n: int, generator: Generator | None = None) -> Tensor:
    """Uniform with one draw in each n-th of the path, in random order.

    The mean of a loss over one such batch varies far less than over n independent times. Over an
    accumulation of small batches: draw for all of them at once and deal out.
    """
    cells = torch.randperm(n, generator=generator)
    return _inside((cells + torch.rand(n, generator=generator)) / n)


def stratified_logit_normal(
    n: int, mean: float = 0.0, std: float = 1.0, generator: Generator | None = None
) -> Tensor:
    """Logit-normal with one draw in each n-th of its probability, in random order."""
    even = stratified(n, generator).double()
    return _inside(torch.sigmoid(mean + std * torch.special.ndtri(even)).float())


def resolution_shift(pixels: int, side: int) -> float:
    """The shift sqrt(pixels / side²) of a picture, where a square of `side` needs none.

    More pixels hide the same picture less at the same noise (Esser et al. 2024, eq. 23). Side 0
    stands for any size.
    """
    return math.sqrt(pixels) / side if side else 1.0


def piecewise(points: float | Sequence[Sequence[float]]) -> Callable[[Tensor], Tensor]:
    """A constant, or straight lines through points (t, w), t rising, level beyond the ends."""
    if isinstance(points, int | float):
        return lambda t: torch.full_like(t, points)
    times, heights = torch.tensor(points, dtype=torch.float64).T.contiguous()

    def at(t: Tensor) -> Tensor:
        x, y = times.to(t), heights.to(t)
        right = torch.searchsorted(x, t.contiguous()).clamp(max=len(x) - 1)
        left = (right - 1).clamp(min=0)
        width = torch.where(right > left, x[right] - x[left], 1)
        return torch.lerp(y[left], y[right], ((t - x[left]) / width).clamp(0, 1))

    return at


def _inside(t: Tensor) -> Tensor:
    return t.clamp(EDGE, 1 - EDGE)


TIMES: dict[str, Draw] = {
    "uniform": uniform,
    "logit-normal": logit_normal,
    "stratified": stratified,
    "stratified-logit-normal": stratified_logit_normal,
}


_shift = shift  # `grid` has an argument of that name


def grid(path: Path, steps: int, *, shift: float = 1.0, spacing: str | None = None) -> Tensor:
    """Times to sample at, (steps + 1,) float64 on the CPU, falling from the first to exactly 0.

    Without a spacing the path's own: "trailing" for paths that end in pure noise, "normal" for
    Stable Diffusion's eps and v. Raises Refused for an unknown spacing or no step.
    """
    name = spacing or path.spacing
    if name not in SPACINGS:
        raise Refused(f"no spacing {name!r}: choose one of {', '.join(SPACINGS)}")
    if steps < 1:
        raise Refused(f"{steps} sampling steps: at least 1 is needed")
    return _shift(SPACINGS[name](path, steps), shift)


def trailing(path: Path, steps: int) -> Tensor:
    """Even from pure noise to data, as flow samplers do; SD's steps 999, 999 - 1000/N, …"""
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64)


def normal(path: Path, steps: int) -> Tensor:
    """Even over the times the network was trained at, then data; SD's steps 999 … 0.

    What k-diffusion, ComfyUI ("normal") and diffusers ("linspace") do with eps and v networks.
    """
    if path.floor == 0:
        return trailing(path, steps)
    return _to_data(torch.linspace(1, path.floor, steps, dtype=torch.float64))


def leading(path: Path, steps: int) -> Tensor:
    """SD's steps 1001 - 1000/N, …, 1001 - 1000 N/N: never at the noisiest, as early samplers did.

    diffusers' "leading" with steps_offset 1. Images lean towards middling brightness (Lin et al.
    2024, section 3.3); for comparison with old pictures only.
    """
    times = torch.arange(steps - 1, -1, -1, dtype=torch.float64) / steps
    return _to_data((times + 0.002).clamp(max=1))


def karras(path: Path, steps: int, rho: float = 7.0) -> Tensor:
    """Even in (sigma/alpha)^(1/7), then data (Karras et al. 2022, eq. 5).

    A path that ends in pure noise or pure data takes that paper's bounds, 80 and 0.002; the first
    time is 1 all the same.
    """
    ends = torch.tensor([1.0, path.floor], dtype=torch.float64)
    alpha, sigma = path(ends)
    high, low = (sigma / alpha).clamp(0.002, 80) ** (1 / rho)
    ratio = torch.lerp(high, low, torch.linspace(0, 1, steps, dtype=torch.float64)) ** rho
    times = path.time(torch.ones_like(ratio), ratio)
    times[0] = 1
    return _to_data(times)


def _to_data(times: Tensor) -> Tensor:
    return torch.cat([times, torch.zeros(1, dtype=times.dtype)])


SPACINGS: dict[str, Callable[[Path, int], Tensor]] = {
    "trailing": trailing,
    "normal": normal,
    "leading": leading,
    "karras": karras,
}
