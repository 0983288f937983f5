"""How far blocks have moved while they are trained: for the log, and as a picture at the end."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from recast.adapter import entry_name
from recast.adapter.layers import LoCon
from recast.commit import commit
from recast.evaluate.track import by_block, change_png
from recast.lowrank import LowRank, squared_norm
from recast.recipe import Recipe

if TYPE_CHECKING:
    from recast.adapter import Attached
    from recast.layout import Layout

POINTS = 50  # of a whole run, about
FEWEST = 8  # that make a picture
PICTURE = "changes.png"


@dataclass(frozen=True)
class Moving:
    """The layers that are trained, by block, and how often they are looked at."""

    attached: Attached
    blocks: dict[str, str]
    every: int

    @classmethod
    def of(cls, attached: Attached, layout: Layout, recipe: Recipe) -> Moving:
        sites = layout.sites("every")
        blocks = {entry_name(site): site.block for site in sites}
        return cls(attached, blocks, max(1, round(recipe.train.limit / POINTS)))

    def due(self, step: int, end: int) -> bool:
        return step % self.every == 0 or step in (1, end)

    @torch.no_grad()
    def norms(self) -> dict[str, float]:
        """The Frobenius norm of each block's change."""
        squares = [(self.blocks[spot.name], square(spot.layer)) for spot in self.attached.spots]
        return {block: float(f"{norm:.6g}") for block, norm in by_block(squares).items()}


def square(layer: torch.nn.Module) -> float:
    """The squared norm of what a layer adds to its weight."""
    if isinstance(layer, LoCon):
        return max(0.0, squared_norm(LowRank(*layer.change())))
    total = layer.delta.double().square().sum()  # type: ignore[operator]
    # of weights that are shared out this is one process's share
    return (total.full_tensor() if hasattr(total, "full_tensor") else total).item()


def write_picture(root: Path) -> bool:
    """Draw what the log tells of the changes; whether that was enough for a picture."""
    rows = []
    with (root / "log.jsonl").open(encoding="utf-8") as log:
        rows = [row for line in log if "change" in (row := json.loads(line))]
    if len(rows) < FEWEST:
        return False
    norms = {block: [row["change"][block] for row in rows] for block in rows[-1]["change"]}
    data = change_png([row["step"] for row in rows], norms)
    commit(root / PICTURE, lambda file: file.write(data), size=len(data), force=True)
    return True
