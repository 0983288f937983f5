"""Pictures that the original made, noised anew: images without a folder of images.

The last step of each dreamt picture gives its latents, x0 = x - t u under the guidance it was
dreamt with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recast.convert.bridge import Bridge
from recast.convert.noising import draw, drawn
from recast.dream import Plan, Shard
from recast.objective import Objective
from recast.recipe import Recipe
from recast.train import Aware, Draw, seeded

if TYPE_CHECKING:
    from recast.text.encode import Condition


@dataclass(frozen=True)
class Selfmade:
    """Latents x0 (P, C, h, w), noised along the new path; of another space where there is a bridge.

    `row` names each picture's condition; the last condition is the empty prompt's, the one before
    it all zeros.
    """

    x0: Tensor
    row: Tensor
    zeroed: tuple[bool, ...]
    conditions: Condition
    recipe: Recipe
    objective: Objective
    device: str
    factor: int
    bridge: Bridge | None = None

    def draws(self, done: int, aware: Aware | None = None) -> Iterator[Draw]:
        return drawn(self.recipe, self.draw, done, aware)

    def draw(self, number: int, t: Tensor, weight: Tensor | None) -> Draw:
        """Batch `number`: any pictures, without their prompt as often as captions are dropped."""
        how = self.recipe.train
        generator = seeded(how.seed, "selfmade", number)
        index = torch.randint(len(self.x0), (how.batch,), generator=generator)
        gone = torch.rand(how.batch, generator=generator) < self.recipe.data.caption_dropout
        zeroed = torch.tensor(self.zeroed)[index]
        null = torch.where(zeroed, len(self.conditions) - 2, len(self.conditions) - 1)
        row = torch.where(gone, null, self.row[index])
        x0 = self.x0[index].to(self.device)
        condition = self.conditions[row].to(torch.device(self.device))
        return draw(
            self.recipe, self.objective, number, x0, t, weight, condition, index, self.factor
        )

    def null(self) -> Condition:
        return self.conditions[-1]


@dataclass(frozen=True)
class Finished:
    """Latents x0 (P, C, h, w) of dreamt pictures, their prompts, whether zeros stood for none."""

    x0: Tensor
    prompts: tuple[str, ...]
    zeroed: tuple[bool, ...]


def finished(shards: Sequence[Shard], plan: Plan) -> Finished:
    """What a dream ended with."""
    found: list[Tensor] = []
    prompts: list[str] = []
    zeroed: list[bool] = []
    for shard in shards:
        found.append(shard.latents(plan.guidance))
        prompts += shard.prompts
        zeroed += shard.zeroed or [False] * len(shard.prompts)
    return Finished(torch.cat(found), tuple(prompts), tuple(zeroed))
