"""Proof of identity: the converted file is good under its new sampler and bad under the old one.

A file that is still the original, or one whose marker was changed but not its weights, shows the
opposite: that is what this figure is there to catch.
"""

from collections.abc import Sequence

from torch import Tensor

from recast.evaluate.agreement import agreement
from recast.evaluate.metrics import statistics
from recast.evaluate.values import Identity

MARGIN = 3.0  # dB by which the new sampler must be nearer to the original's pictures


def identity(
    originals: Sequence[Tensor],
    new: Sequence[Tensor],
    old: Sequence[Tensor],
    *,
    judged: tuple[float, float] | None = None,
) -> Identity:
    """Compare pictures (3, H, W) of the converted file under the new and the `old` sampler.

    `judged` is the share of pictures showing their prompt, new and old. Lists may be of different
    lengths; the first of each belong together. `proven` says the new sampler wins by MARGIN.
    """
    count = min(len(originals), len(new), len(old))
    originals, new, old = originals[:count], new[:count], old[:count]
    right, wrong = agreement(originals, new).mean, agreement(originals, old).mean
    return Identity(
        psnr_new=right,
        psnr_old=wrong,
        variation_original=statistics(originals).total_variation,
        variation_new=statistics(new).total_variation,
        variation_old=statistics(old).total_variation,
        judged_new=judged[0] if judged else None,
        judged_old=judged[1] if judged else None,
        proven=right - wrong >= MARGIN,
    )
