"""Which of the assessor's time bins can be believed: Wilson's lower bound of its accuracy there.

    lower(p, n) = (p + z²/2n - z sqrt(p (1 - p)/n + z²/4n²)) / (1 + z²/n)

(Wilson 1927.) Where a bin is not believed its signals are left out and its difficulty counts as the
median; training and sampling go on there as everywhere.
"""

import torch
from torch import Tensor

from recast.errors import Refused

LEAST = 0.5  # share of the bins without which an assessor says too little


def wilson(correct: Tensor, n: Tensor, z: float = 1.96) -> Tensor:
    """The lower end of a rate's confidence interval, float64; 0 where nothing was counted.

    `correct` may hold means of several counts of the same `n` samples.
    """
    n = n.double()
    some = n.clamp(min=1)
    p = correct.double() / some
    inside = (p * (1 - p) / some + (z / (2 * some)).square()).clamp(min=0)
    lower = (p + z * z / (2 * some) - z * inside.sqrt()) / (1 + z * z / some)
    return torch.where(n > 0, lower.clamp(min=0), 0)


def active_bins(
    correct: Tensor, n: Tensor, *, threshold: float = 0.15, worst: float = 0.0
) -> Tensor:
    """The bins (K,) whose accuracy is `threshold` at least, for all that chance can do.

    `worst` leaves out that share of the bins besides, the least accurate (S5 lost about 0.10). The
    threshold is 15 times chance at 100 bins. Raises Refused where fewer than half of the bins pass:
    the assessor is unusable.
    """
    lower = wilson(correct, n)
    active = lower >= threshold
    if active.double().mean() < LEAST:
        raise Refused(
            f"the assessor is unusable: only {int(active.sum())} of its {len(active)} time bins are"
            f" told apart with an accuracy of {threshold:g}; train it longer, or with fewer bins"
        )
    doomed = lower.argsort()[: round(worst * len(lower))]
    active[doomed] = False
    return active
