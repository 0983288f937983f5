"""Times drawn where the loss is large, without changing what is minimised.

    P_k proportional to sqrt(E[L²]) of bin k        p = (1 - floor) P + floor / K
    weight of a sample = 1 / (K p_k)

is the distribution of least variance for the estimate of the mean over uniform times (importance
sampling; Nichol & Dhariwal 2021, eq. 18). What has been seen of each bin is the state; a run that
resumes with it draws the same times.
"""

import torch
from torch import Generator, Tensor

from recast.timesteps import EDGE, stratified

MEMORY = 0.9  # of a bin's running mean, per step that visits it


class Aware:
    """The running mean of L² in each of K equal bins of t; `floor` of the draws stay uniform."""

    def __init__(self, floor: float = 0.1, bins: int = 32) -> None:
        self.floor = floor
        self.squares = torch.zeros(bins, dtype=torch.float64)
        self.seen = torch.zeros(bins, dtype=torch.bool)

    def probabilities(self) -> Tensor:
        """p (K,); bins not seen yet count as the mean of those that were."""
        size = self.squares.sqrt()
        if not size.sum() > 0:
            return torch.full_like(size, 1 / len(size))
        size = torch.where(self.seen, size, size[self.seen].mean())
        return (1 - self.floor) * size / size.sum() + self.floor / len(size)

    def draw(self, n: int, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        """Times and their weights, (n,) float32: one draw in each n-th of the probability."""
        p = self.probabilities()
        ends = p.cumsum(0)
        u = stratified(n, generator).double() * ends[-1]
        k = torch.searchsorted(ends, u).clamp(max=len(p) - 1)
        within = (u - ends[k] + p[k]) / p[k]
        t = ((k + within) / len(p)).clamp(EDGE, 1 - EDGE)
        return t.float(), (1 / (len(p) * p[k])).float()

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Learn from the weighted losses (B,) of one step at t (B,); before the next draw."""
        bins = (t.double() * len(self.squares)).long().clamp(0, len(self.squares) - 1)
        for k in bins.unique().tolist():
            mean = losses[bins == k].double().square().mean()
            keep = MEMORY if self.seen[k] else 0.0
            self.squares[k] = keep * self.squares[k] + (1 - keep) * mean
            self.seen[k] = True

    def state(self) -> dict[str, Tensor]:
        """What to save."""
        return {"squares": self.squares.clone(), "seen": self.seen.clone()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a saved state."""
        self.squares, self.seen = state["squares"].clone(), state["seen"].clone()
