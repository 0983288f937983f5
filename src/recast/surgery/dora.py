"""DoRA's change of a weight, which is a LoRA of one checkpoint: it depends on that one's weights.

    W' = m (W + s B A) / (|W + s B A| + eps)        dW = W' - W

(Liu et al., 2024, arXiv:2402.09353.) m and the norm run over the outputs where m has the shape
(O, 1, ...), as LyCORIS trains it, else over the inputs, (1, I, 1, ...), as in the paper.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = torch.finfo(torch.float32).eps  # as loaders add it


def baked(weight: Tensor, change: Tensor, magnitude: Tensor) -> Tensor:
    """dW in fp64 from W, s B A and m; weight and change are (O, I[, kh, kw])."""
    moved = weight.double() + change.double()
    by_output = magnitude.shape[0] == len(moved) and magnitude.numel() == len(moved)
    over = tuple(axis for axis in range(moved.ndim) if axis != (0 if by_output else 1))
    norm = moved.square().sum(over, keepdim=True).sqrt() + EPS
    return moved * (magnitude.double().reshape(norm.shape) / norm) - weight.double()
