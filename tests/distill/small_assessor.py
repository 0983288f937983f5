"""A small assessor and features for it."""

import torch

from recast.distill.assessor import Assessor, Shape


def small(head: str = "subcentre", prototypes: str = "per_bin", bins: int = 10) -> Assessor:
    shape = Shape({"down_0": 6, "mid": 9}, 16, 20, bins, 3, prototypes, head)
    return Assessor(shape, torch.Generator().manual_seed(0))


def pooled(n: int = 32, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"down_0": torch.randn(n, 6, generator=generator),
            "mid": torch.randn(n, 9, generator=generator)}  # fmt: skip


TIMES = torch.linspace(0, 1, 32)
