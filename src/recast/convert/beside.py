"""What is learned beside the network: a weight for every noise level, and where to draw times.

Both belong to a run's state: they are saved with it and go on exactly where they stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from recast.recipe import Recipe
from recast.train import Aware, Learned, Step, restore

if TYPE_CHECKING:
    import torch
    from torch.optim import Optimizer


@dataclass(frozen=True)
class Beside:
    """A learned weight with its own optimizer, and loss-aware times; each None if not asked for."""

    learned: Learned | None
    partner: Optimizer | None
    aware: Aware | None

    @classmethod
    def of(cls, recipe: Recipe, device: torch.device) -> Beside:
        """What the recipe asks for, as it is before the first step."""
        from recast.optim import build

        how = recipe.train
        learned = Learned(how.seed).to(device) if how.weighting == "edm2" else None
        partner = None
        if learned is not None:
            weights = list(learned.parameters())
            partner = build("adamw", weights, lr=how.edm2_lr, betas=[0.9, 0.99])
        aware = Aware(how.aware_floor) if how.times == "loss-aware" else None
        return cls(learned, partner, aware)

    def update(self, step: Step) -> None:
        """Take in what a step saw, unless it was skipped."""
        if self.aware is not None and not step.skipped:
            self.aware.update(step.times, step.weighted)

    def state(self) -> dict[str, Any]:
        """What to save; empty where nothing is learned."""
        found: dict[str, Any] = {}
        if self.learned is not None and self.partner is not None:
            found["learned"] = dict(self.learned.state_dict())
            found["partner"] = self.partner.state_dict()
        if self.aware is not None:
            found["aware"] = self.aware.state()
        return found

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on from what was saved."""
        if self.learned is not None and self.partner is not None:
            self.learned.load_state_dict(saved["learned"])
            restore(self.partner, saved["partner"])
        if self.aware is not None:
            self.aware.restore(saved["aware"])
