"""Distances between an output and its target, one number per sample, and the criterion.

    loss = mean over samples of  weight * distance(output, target)

Weights act on each sample after the mean over C, H, W, never on the mean of a batch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from recast.objective import Objective
from recast.train.draws import Draw
from recast.train.targets import Target
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
    """A measure (B, C, H, W) x 2 -> (B,), taken between outputs or between the x0 they imply."""

    measure: Callable[[Tensor, Tensor], Tensor]
    of_x0: bool = False


def mse(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error."""
    return (output - target).square().flatten(1).mean(1)


def l1(output: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error."""
    return (output - target).abs().flatten(1).mean(1)


def huber(output: Tensor, target: Tensor, c: float = 0.1) -> Tensor:
    """Smooth absolute error 2c (sqrt(d² + c²) - c), kohya's form: d² near 0, 2c|d| far out."""
    d = output - target
    return (2 * c * ((d.square() + c * c).sqrt() - c)).flatten(1).mean(1)


def fft(output: Tensor, target: Tensor, phase: float = 0.1) -> Tensor:
    """Squared error of the spectrum's magnitudes, and `phase` times that of its directions.

    The complex error of an orthonormal transform would be plain mse again (Parseval). The
    published loss of this name is not documented anywhere; this is a definition, not a copy.
    Directions are z / sqrt(|z|² + 0.01), so that empty frequencies do not pull.
    """
    a, b = (torch.fft.fft2(v, norm="ortho") for v in (output, target))
    size_a, size_b = ((z.real.square() + z.imag.square() + 1e-12).sqrt() for z in (a, b))
    turn = a / (size_a.square() + 0.01).sqrt() - b / (size_b.square() + 0.01).sqrt()
    turned = turn.real.square() + turn.imag.square()
    return ((size_a - size_b).square() + phase * turned).flatten(1).mean(1)


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
) -> Criterion:
    """The loss of a draw, in fp32: distance to the target, times weighting(t), times its weight.

    A distance of x0 is divided by max(k, 0.01), k its squared error per squared error of the
    output, so that noise levels weigh against each other as they do in a distance of outputs.
    """

    def measure(output: Tensor, wanted: Tensor, draw: Draw) -> Tensor:
        if not distance.of_x0:
            return distance.measure(output, wanted)
        _, gain = snr_and_gain(*objective.path(draw.t), objective)
        x0_hat, x0 = (objective.split(draw.x.float(), v, draw.t)[0] for v in (output, wanted))
        return distance.measure(x0_hat, x0) / gain.clamp(min=0.01)

    def loss(net: Student, draw: Draw) -> Seen:
        answer = target(draw)
        output = net(draw)
        with torch.autocast(output.device.type, enabled=False):
            found = measure(output.float(), answer.value.float(), draw)
        weight = answer.weight
        if weighting is not None:
            weight = weight * weighting(*objective.path(draw.t), objective)
        return Seen(found, found * weight)

    return loss
