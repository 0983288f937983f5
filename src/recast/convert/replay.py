"""Replay as a source of draws: states and velocities that the original met while it painted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from recast.convert.noising import aimed, drawn, shifted
from recast.convert.texts import Told
from recast.dream import Shard
from recast.objective import FLOW, Objective, retime
from recast.recipe import Recipe
from recast.train import Aware, Draw, replayed, seeded

if TYPE_CHECKING:
    from torch import Tensor

    from recast.text.encode import Condition

ZERO = "\0"  # no prompt can be that: names the row of zeroed conditioning


@dataclass(frozen=True)
class Replay:
    """States and velocities of pictures that the original made, and the prompts they were made of.

    `conditions` has a row for every prompt of `rows`; the last one is the empty prompt's, the one
    before it (ZERO) all zeros. `reads`: the text encoders are trained, and read the prompts
    themselves, so that they too are held to what the original answered.
    """

    shards: tuple[Shard, ...]
    conditions: Condition
    rows: dict[str, int]
    recipe: Recipe
    objective: Objective
    device: str
    factor: int
    reads: bool = False
    bridge: None = None

    def draws(self, done: int, aware: Aware | None = None) -> Iterator[Draw]:
        return drawn(self.recipe, self.draw, done, aware)

    def null(self) -> Condition:
        return self.conditions[-1]

    def draw(self, number: int, t: Tensor, weight: Tensor | None) -> Draw:
        """Batch `number`, near the times t where the recipe asks for other than even ones."""
        made = self.pairs(number, t if aimed(self.recipe) else None)
        return made if weight is None else replace(made, weight=weight.to(made.t))

    def pairs(self, number: int, aim: Tensor | None = None) -> Draw:
        """Batch `number`: any pairs, the unprompted ones as often as captions are dropped.

        Each is the one of its picture's states that is nearest to the time aimed at, if any is.
        """
        how = self.recipe.train
        places = [(s, k) for s, shard in enumerate(self.shards) for k in range(len(shard.prompts))]
        generator = seeded(how.seed, "replay", number)
        picture = torch.randint(len(places), (how.batch,), generator=generator).tolist()
        state = torch.rand(how.batch, generator=generator).tolist()
        null = torch.rand(how.batch, generator=generator) < self.recipe.data.caption_dropout
        t, x, u, row = [], [], [], []
        for i, (place, gone) in enumerate(zip(picture, null.tolist(), strict=True)):
            shard, k = self.shards[places[place][0]], places[place][1]
            step = int(state[i] * len(shard.t))
            if aim is not None:
                step = self.nearest(shard, aim[i])
            t.append(shard.t[step])
            x.append(shard.x[step, k])
            u.append(shard.u_null[step, k].float() if gone else self.answer(shard, step, k))
            unprompted = ZERO if shard.zeroed[k] else ""
            row.append(self.rows[unprompted if gone else shard.prompts[k]])
        return self._draw(torch.stack(t), torch.stack(x), torch.stack(u), torch.tensor(row))

    def nearest(self, shard: Shard, aim: Tensor) -> int:
        """The state whose time on the new path is nearest to one that is aimed at."""
        pixels = shard.x[0, 0, 0].numel() * self.factor**2
        there = retime(shard.t.float(), FLOW.path, self.objective.path)
        return int((there - shifted(self.recipe, aim, pixels)).abs().argmin())

    def answer(self, shard: Shard, step: int, k: int) -> Tensor:
        """The original's answer to a prompt, guided as the recipe's target has it."""
        u, scale = shard.u[step, k].float(), self.recipe.target.guided
        if scale == 1:
            return u
        u_null = shard.u_null[step, k].float()
        return u_null + scale * (u - u_null)

    def _draw(self, t: Tensor, x: Tensor, u: Tensor, row: Tensor) -> Draw:
        t, x, u = (value.to(self.device, torch.float32) for value in (t, x, u))
        wide = t.view(-1, 1, 1, 1)
        x0, eps = x - wide * u, x + (1 - wide) * u
        time = retime(t, FLOW.path, self.objective.path)
        made = replayed(self.objective, x0, time, eps, self.conditions[row], row)
        if not self.reads:
            return made
        prompts = list(self.rows)  # in the order of their rows
        said = tuple(prompts[k].replace(ZERO, "") for k in row.tolist())
        return replace(made, condition=Told(said, made.condition))
