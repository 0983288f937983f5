"""An exponential moving average of trained parameters, in fp32.

    d_n = min(decay, (1 + n) / (10 + n))        m <- d_n m + (1 - d_n) p

torch's AveragedModel copies a whole module; here only the trained tensors are averaged.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class Ema:
    """The running average of a list of tensors; `count` is the number of updates so far."""

    def __init__(self, parameters: Sequence[Tensor], decay: float = 0.999) -> None:
        self.parameters = list(parameters)
        self.decay = decay
        self.count = 0
        self.tensors = [p.detach().float().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the parameters as they are now."""
        self.count += 1
        rate = 1 - min(self.decay, (1 + self.count) / (10 + self.count))
        for mean, parameter in zip(self.tensors, self.parameters, strict=True):
            mean.lerp_(parameter.detach().float(), rate)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Put the averages in the parameters' place; the parameters return byte for byte."""
        before = [p.detach().clone() for p in self.parameters]
        self._place(self.tensors)
        try:
            yield
        finally:
            self._place(before)

    @torch.no_grad()
    def _place(self, tensors: Sequence[Tensor]) -> None:
        for parameter, tensor in zip(self.parameters, tensors, strict=True):
            parameter.copy_(tensor)
