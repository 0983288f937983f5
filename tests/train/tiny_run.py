"""A training run of milliseconds: a two-layer network, draws by counter, any optimizer."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from recast.objective import FLOW, Objective
from recast.train import Draw, noised, seeded


class Tiny(nn.Module):
    """Two convolutions that see x and t; wide enough that optimizers factorise their state."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(5, 36, 3, padding=1), nn.Conv2d(36, 4, 1)
        gen = torch.Generator().manual_seed(1)
        for p in self.parameters():
            p.data = (torch.randn(p.shape, generator=gen) * 0.1).to(dtype)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        clock = t.view(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])
        seen = torch.cat([x, clock], 1).to(self.one.weight.dtype)
        return self.two(torch.tanh(self.one(seen)))

    def student(self, draw: Draw) -> Tensor:
        return self(draw.x, draw.t)


def draw(step: int, objective: Objective = FLOW, n: int = 4, size: int = 4) -> Draw:
    """The draw of one step: data whose four channels differ in mean."""
    gen = seeded(0, "draw", step)
    x0 = torch.randn(n, 4, size, size, generator=gen) * 0.5 + torch.arange(4.0).view(1, 4, 1, 1) / 2
    t = torch.rand(n, generator=gen).clamp(1e-3, 1 - 1e-3)
    return noised(objective, x0, t, torch.randn(x0.shape, generator=gen), index=torch.arange(n))


def stream(start: int = 0, **options: object) -> Iterator[Draw]:
    """Draws without end, from step `start` on."""
    while True:
        yield draw(start, **options)
        start += 1
