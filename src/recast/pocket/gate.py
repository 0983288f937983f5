"""The gates: what the judge must read off a picture before the work goes on."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from recast.errors import CheckFailed
from recast.pocket.world import Scene, scenes

VAE_GATE = {"shape": 0.98}
SEEN_GATE = {"shape": 0.97, "all": 0.95}
HELD_GATE = {"shape": 0.93}
COUNT = 400

Figures = Mapping[str, float]


def sample(held: bool | None, count: int, seed: int) -> list[Scene]:
    """Return scenes of the trained (False) or held (True) combinations, shapes in equal shares."""
    pool = scenes(held)
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed)).tolist()
    shapes = sorted({scene.shape for scene in pool})
    queues = [[pool[row] for row in order if pool[row].shape == shape] for shape in shapes]
    picks = (divmod(index, len(shapes)) for index in range(count))
    return [queues[shape][turn % len(queues[shape])] for turn, shape in picks]


def text(figures: Figures) -> str:
    """Return figures as one line."""
    return " ".join(f"{name} {value:.3f}" for name, value in figures.items())


def check(what: str, figures: Figures, gate: Figures) -> None:
    """Refuse to go on where a figure is below its gate."""
    short = {name: figures[name] for name, least in gate.items() if figures[name] < least}
    if short:
        raise CheckFailed(
            f"{what} does not pass its gate: {text(short)}, wanted {text(gate)}."
            " Train that stage longer or change its settings in recast/pocket/pipeline.py."
        )
