"""What bench/distill sees of a student, all on held-out pictures drawn from other seeds.

error      mean (v^ - v)², v = alpha eps - sigma x0 the true one, 2,000 samples of 500
           pictures, evenly over t
few        the same on every tenth of them, for curves
energy     squared energy distance of 200 samples to the held-out pictures (Székely & Rizzo)
right      attributes of these samples that the pocket world's judge sees as asked
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from _distill_arms import BINS
from _distill_stats import correlation
from _distill_world import World, bound, world
from torch import Tensor

from recast.checkpoint import write_dict
from recast.objective import EPS, Objective, V, express, start
from recast.train.draws import seeded

if TYPE_CHECKING:
    from torch import nn

    from recast.distill.assessor import Assessor

Row = dict[str, Any]
AT_ONCE = 200
COUNT = 2000
SAMPLES, GRID = 200, 12
KEPT = 10


@dataclass(frozen=True)
class Held:
    """Held-out samples in an order of which every tenth is as even over t as all."""

    data: World
    eps: Tensor
    t: Tensor
    teacher: nn.Module

    @torch.no_grad()
    def errors(self, unet: nn.Module, objective: Objective, few: bool = False) -> Tensor:
        """(v^ - v)² of each sample, (N,)."""
        found = []
        for rows in self.rows(few):
            x0, shown, eps, t = self.batch(rows)
            net = express(bound(unet, objective.path, shown), objective, V)
            answer = net(V.noise(x0, eps, t), t)
            found.append((answer - V.target(x0, eps, t)).square().flatten(1).mean(1))
        return torch.cat(found)

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(x0, shown, eps, t): sample i is of picture i modulo their number."""
        which = rows % len(self.data.x0)
        return self.data.x0[which], self.data.shown[which], self.eps[rows], self.t[rows]

    def rows(self, few: bool = False) -> list[Tensor]:
        """Indices, batch by batch."""
        return list(torch.arange(0, len(self.t), 10 if few else 1).split(AT_ONCE))

    def error(self, unet: nn.Module, objective: Objective, few: bool = False) -> float:
        """The mean over samples."""
        return round(self.errors(unet, objective, few).mean().item(), 6)

    def by_bin(self, values: Tensor, bins: int = BINS) -> list[float]:
        """The mean of each time bin."""
        k = (self.t * bins).long()
        return [values[k == each].mean().item() for each in range(bins)]


def held(teacher: nn.Module) -> Held:
    """The held-out set: times are one in each 2,000th of [0, 1], dealt out at random.

    The i-th of every ten times belongs to the few, so that both are even over t.
    """
    data, source, every = world("held"), seeded("held"), torch.arange(COUNT)
    t = (every + torch.rand(COUNT, generator=source)) / COUNT
    few, others = every[::10], every[every % 10 > 0]
    order = torch.empty(COUNT, dtype=torch.long)
    order[few] = few[torch.randperm(len(few), generator=source)]
    order[others] = others[torch.randperm(len(others), generator=source)]
    eps = torch.randn(COUNT, *data.x0.shape[1:], generator=source)
    return Held(data, eps, t[order].clamp(min=EPS.path.floor), teacher)


def measure(
    it: Held, unet: nn.Module, seed: int, objective: Objective = V, keep: Path | None = None
) -> Row:
    """The primary figure, by decile too, and what sampling gives; `keep`: a file for samples."""
    errors = it.errors(unet, objective)
    made = samples(it, unet, seed, objective)
    if keep:
        write_dict(keep, {"x0": made[:KEPT].contiguous()}, {}, force=True)
    return {
        "error": round(errors.mean().item(), 6),
        "deciles": [round(value, 6) for value in it.by_bin(errors, 10)],
        "energy": round(energy(made.flatten(1), it.data.x0.flatten(1)), 5),
    }


@torch.no_grad()
def samples(it: Held, unet: nn.Module, seed: int, objective: Objective) -> Tensor:
    """DDIM samples of the first held-out scenes, from noise that all arms of a seed share."""
    from recast.sample.guidance import plain
    from recast.sample.solvers import ddim
    from recast.timesteps import grid

    shape = (SAMPLES, *it.data.x0.shape[1:])
    x = start(objective.path, torch.randn(shape, generator=seeded("samples", seed)))
    net = bound(unet, objective.path, it.data.shown[:SAMPLES])
    *_, last = ddim(plain(net, objective), objective.path, x, grid(objective.path, GRID))
    return last


def energy(first: Tensor, second: Tensor) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'|, without the pairs of a sample with itself."""

    def within(each: Tensor) -> Tensor:
        return torch.cdist(each, each).sum() / (len(each) * (len(each) - 1))

    across = 2 * torch.cdist(first, second).mean()
    return float(across - within(first) - within(second))


@torch.no_grad()
def signals_by_bin(it: Held, unet: nn.Module, assessor: Assessor) -> Row:
    """e_t (relative) and KD of the student, by block and bin, and their rank correlation."""
    from recast.distill.losses import kd_pooled
    from recast.distill.signals import assess
    from recast.distill.taps import FeatureTap, pool

    found = []
    with FeatureTap(unet) as mine, FeatureTap(it.teacher) as theirs:
        for rows in it.rows():
            x0, shown, eps, t = it.batch(rows)
            x = V.noise(x0, eps, t)
            bound(unet, V.path, shown)(x, t)
            bound(it.teacher, EPS.path, shown)(x, t)
            student, original = mine.taken(), theirs.taken()
            seen = assess(assessor, pool(student), t, teacher_pooled=pool(original))
            found.append((seen.e_t, kd_pooled(student, original)))
    e_t, kd = (torch.cat(each).T for each in zip(*found, strict=True))
    tables = [[it.by_bin(row) for row in each] for each in (e_t, kd)]
    flat = [[value for row in table for value in row] for table in tables]
    short = [[[float(f"{v:.4g}") for v in row] for row in table] for table in tables]
    return {"e_t": short[0], "kd_bins": short[1], "e_t_kd": round(correlation(*flat), 4)}


def spread_of(values: Sequence[float]) -> float:
    """The mean, to four digits."""
    return float(f"{statistics.fmean(values):.4g}")
