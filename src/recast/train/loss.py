"""Distances between an output and its target, one number per sample, and the criterion.

    loss = mean over samples of  weight * distance(output, target)

Weights act on each sample after the mean over C, H, W, never on the mean of a batch.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from recast.objective import Objective, Path
from recast.train.draws import Draw
from recast.train.learned import Learned
from recast.train.targets import Share, Target
from recast.weighting import Weighting, snr_and_gain

Student = Callable[[Draw], Tensor]  # the network at draw.x, draw.t, bound to draw.condition


@dataclass(frozen=True)
class Seen:
    """What a criterion found: each sample's distance, and that distance weighted; both (B,)."""

    distance: Tensor
    weighted: Tensor


Criterion = Callable[[Student, Draw], Seen]


@dataclass(frozen=True)
class Distance:
    """A measure (B, C, H, W) x 2 -> (B,), taken between outputs or between the x0 they imply.

    With a `scale` the measure has a third argument, one number per sample: scale(path, t).
    """

    measure: Callable[..., Tensor]
    of_x0: bool = False
    scale: Callable[[Path, Tensor], Tensor] | None = None


def mse(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error."""
    return (output - target).square().flatten(1).mean(1)


def l1(output: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error."""
    return (output - target).abs().flatten(1).mean(1)


def huber(output: Tensor, target: Tensor, c: float | Tensor = 0.1) -> Tensor:
    """Smooth absolute error 2c (sqrt(d² + c²) - c), kohya's form: d² near 0, 2c|d| far out.

    `c` may be one number per sample, (B,).
    """
    d = output - target
    if isinstance(c, Tensor):
        c = c.to(d).view(-1, *[1] * (d.ndim - 1))
    return (2 * c * ((d.square() + c * c).sqrt() - c)).flatten(1).mean(1)


def exponential(c: float) -> Callable[[Path, Tensor], Tensor]:
    """c^(k/1000), k what the network is told: 1 at data, c at noise (kohya's "exponential")."""
    return lambda path, t: torch.exp(math.log(c) / 1000 * path.embed(t))


def by_snr(c: float) -> Callable[[Path, Tensor], Tensor]:
    """(1 - c) / (1 + sigma/alpha)² + c: 1 at data, c at noise (kohya's "snr"), on any path."""

    def scale(path: Path, t: Tensor) -> Tensor:
        alpha, sigma = path(t)
        return (1 - c) * (alpha / (alpha + sigma)).square() + c

    return scale


HUBERS: dict[str, Callable[[float], Distance]] = {
    "constant": lambda c: Distance(partial(huber, c=c)),
    "exponential": lambda c: Distance(huber, scale=exponential(c)),
    "snr": lambda c: Distance(huber, scale=by_snr(c)),
}


def fft(output: Tensor, target: Tensor, phase: float = 0.1, bands: Sequence[float] = ()) -> Tensor:
    """Squared error of the spectrum's magnitudes, and `phase` times that of its directions.

    The complex error of an orthonormal transform would be plain mse again (Parseval). The
    published loss of this name is not documented anywhere; this is a definition, not a copy.
    Directions are z / sqrt(|z|² + 0.01), so that empty frequencies do not pull. `bands` weigh
    equally wide rings of spatial frequency, from the mean to the finest checkerboard.
    """
    a, b = (torch.fft.fft2(v, norm="ortho") for v in (output, target))
    size_a, size_b = ((z.real.square() + z.imag.square() + 1e-12).sqrt() for z in (a, b))
    turn = a / (size_a.square() + 0.01).sqrt() - b / (size_b.square() + 0.01).sqrt()
    turned = turn.real.square() + turn.imag.square()
    error = (size_a - size_b).square() + phase * turned
    if bands:
        error = error * rings(error.shape[-2], error.shape[-1], bands).to(error)
    return error.flatten(1).mean(1)


def rings(height: int, width: int, bands: Sequence[float]) -> Tensor:
    """The weight of every frequency of a (height, width) transform, by its distance from 0."""
    y, x = torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)
    radius = (y.square() + x.square()).mul(2).sqrt()  # 1 at the Nyquist corner
    return torch.tensor(bands)[(radius * len(bands)).long().clamp(max=len(bands) - 1)]


DISTANCES: dict[str, Distance] = {
    "mse": Distance(mse),
    "l1": Distance(l1),
    "huber": Distance(huber),
    "fft": Distance(fft, of_x0=True),
}


def criterion(
    target: Target,
    objective: Objective,
    distance: Distance = DISTANCES["mse"],
    weighting: Weighting | None = None,
    *,
    curve: Share | None = None,
    learned: Learned | None = None,
) -> Criterion:
    """The loss of a draw, in fp32: distance to the target, times weighting(t), times its weight.

    `curve` is one more weight, drawn over t by hand; `learned` acts on what the others leave.

    A distance of x0 is divided by max(k, 0.01), k its squared error per squared error of the
    output, so that noise levels weigh against each other as they do in a distance of outputs.

    Where a draw has a mask m the output's error is scaled by sqrt(m) first: a squared error counts
    m times, and one outside the mask is none.
    """

    def measure(output: Tensor, wanted: Tensor, draw: Draw) -> Tensor:
        scale = () if distance.scale is None else (distance.scale(objective.path, draw.t),)
        if not distance.of_x0:
            return distance.measure(output, wanted, *scale)
        _, gain = snr_and_gain(*objective.path(draw.t), objective)
        x0_hat, x0 = (objective.split(draw.x.float(), v, draw.t)[0] for v in (output, wanted))
        return distance.measure(x0_hat, x0, *scale) / gain.clamp(min=0.01)

    def loss(net: Student, draw: Draw) -> Seen:
        answer = target(draw)
        output = net(draw)
        with torch.autocast(output.device.type, enabled=False):
            seen, wanted = output.float(), answer.value.float()
            if draw.mask is not None:
                seen = wanted + draw.mask.sqrt() * (seen - wanted)
            found = measure(seen, wanted, draw)
        weight = answer.weight
        if weighting is not None:
            weight = weight * weighting(*objective.path(draw.t), objective)
        if curve is not None:
            weight = weight * curve(draw.t)
        weighted = found * weight
        if learned is not None:
            weighted = learned.loss(weighted, *objective.path(draw.t))
        return Seen(found, weighted)

    return loss
