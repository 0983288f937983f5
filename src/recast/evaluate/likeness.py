"""How alike two sets of pictures are, without any weights: what a model without a judge is told by.

    colours         1/2 sum |p - q| of the two sets' histograms over 8 x 8 x 8 colours, 0 to 1
    colour entropy, spectrum slope      the second set's mean less the first's
    sharpness, saturation               the second set's mean by the first's

Equal sets give 0, 0, 0, 1, 1. Forgetting shows as colours and entropy that move, blur as a steeper
slope and less sharpness, noise as the opposite, burnt pictures as saturation.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from recast.evaluate.metrics import histogram, statistics


def likeness(one: Sequence[Tensor], other: Sequence[Tensor]) -> dict[str, float]:
    """Compare pictures (3, H, W) in [-1, 1]; the sets may be of different sizes.

    A ratio whose first mean is 0 is left out. Raises ValueError for an empty set.
    """
    a, b = statistics(one), statistics(other)
    found = {
        "colours": (colours(one) - colours(other)).abs().sum().item() / 2,
        "colour entropy": b.colour_entropy - a.colour_entropy,
        "spectrum slope": b.spectrum_slope - a.spectrum_slope,
    }
    for name in ("sharpness", "saturation"):
        before, after = getattr(a, name), getattr(b, name)
        if before:
            found[name] = after / before
    return found


def colours(pictures: Sequence[Tensor]) -> Tensor:
    """Mean colour histogram (512,) of a set."""
    return torch.stack([histogram(picture[None])[0] for picture in pictures]).mean(0)
