"""Validation during training: one fixed set of noisy latents, asked again and again.

    drift   mean |net(x, t) - teacher(x, t)|²     over the levels that the original covers
    data    mean |net(x, t) - target|²            the same levels, against x0 and eps

Latents, noise and times are drawn once, the teacher answers once, and all of it lies in a file
from then on: a reading costs one pass of the student, and nothing of it changes by a resume. The
same noise at every reading shows small changes that fresh noise would hide.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from recast.checkpoint import Checkpoint, write_dict
from recast.evaluate.drift import summarised
from recast.evaluate.metrics import colour_entropy, spectrum_slope, total_variation
from recast.evaluate.values import Level
from recast.objective import Net, Objective
from recast.text.encode import Condition
from recast.train import seeded

BINS = 10  # noise levels: the tenths of TensorBoard's loss/t00 to loss/t09
LOOKED = 6  # the tenth whose x0-hats are decoded: noisy enough to be the model's own picture
CROP = 32  # latents of a side that are decoded at most: the alarm needs no whole picture
POSITIONS = 4096  # latent positions in one pass of the network
NAMES = ("total variation", "colour entropy", "spectrum slope")

Bound = Callable[[Condition], Net]
Decode = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Fixed:
    """Latents x0 (V, C, h, w); rows n = 0 … 10 V - 1 noise latent n mod V at a time in tenth n / V.

    eps and the teacher's answer are (10 V, C, h, w), t and covered (10 V,), in the new objective;
    `figures` (3,) are those of the teacher's own x0-hats, in the order of NAMES.
    """

    x0: Tensor
    eps: Tensor
    t: Tensor
    covered: Tensor
    answer: Tensor
    figures: Tensor
    condition: Condition

    def __len__(self) -> int:
        return len(self.t)

    @property
    def power(self) -> float:
        """Mean square of the teacher's answers: the scale on which a drift is large or small."""
        return self.answer.double().square().mean().item()

    def data(self, rows: slice) -> Tensor:
        """The latents of some rows."""
        return self.x0[torch.arange(len(self))[rows] % len(self.x0)]


@dataclass(frozen=True)
class Reading:
    """One validation after `step` steps; `levels` are drift and data error of each tenth of t.

    `figures` are those of NAMES, or none at all where nothing was decoded.
    """

    step: int
    drift: float
    data: float
    figures: tuple[float, ...]
    levels: tuple[tuple[float, float], ...]

    @property
    def named(self) -> dict[str, float]:
        """The figures by their names."""
        return dict(zip(NAMES, self.figures, strict=True)) if self.figures else {}


@torch.no_grad()
def fix(
    teacher: Bound,
    source: Objective,
    objective: Objective,
    x0: Tensor,
    condition: Condition,
    decode: Decode,
    seed: int,
) -> Fixed:
    """Draw noise and times for latents x0 (V, C, h, w) and have the original answer.

    `teacher` answers in `objective`; `source` is its own and decides which rows it covers.
    """
    count, at = len(x0), seeded(seed, "validation")
    eps = torch.randn(BINS * count, *x0.shape[1:], generator=at)
    part = torch.rand(BINS, count, generator=at)
    t = ((torch.arange(BINS)[:, None] + part) / BINS).clamp(max=1 - 1e-6).flatten()
    covered = source.path.covers(*objective.path(t)).float()
    fixed = Fixed(x0.float().cpu(), eps, t, covered, eps, torch.zeros(3), condition.to("cpu"))
    fixed = replace(fixed, answer=answers(teacher, fixed, objective, x0.device))
    seen = figures(fixed, fixed.answer, objective, decode)
    return replace(fixed, figures=torch.tensor(seen, dtype=torch.float64))


@torch.no_grad()
def read(
    net: Bound,
    fixed: Fixed,
    objective: Objective,
    decode: Decode | None,
    device: torch.device | str,
    step: int,
) -> Reading:
    """Ask the network as it is now, told the times of `objective`'s path.

    Without `decode` there are no figures.
    """
    ours = answers(net, fixed, objective, device)
    data = objective.target(fixed.data(slice(None)), fixed.eps, fixed.t)
    errors = torch.stack(
        [
            (a - b).double().square().flatten(1).mean(1)
            for a, b in ((ours, fixed.answer), (ours, data), (fixed.answer, data))
        ]
        + [fixed.covered.double()],
        1,
    ).view(BINS, -1, 4)
    levels = tuple(
        Level(k / BINS, (k + 1) / BINS, *row) for k, row in enumerate(errors.mean(1).tolist())
    )
    table = summarised(levels, objective.name)
    return Reading(
        step,
        _number(table.against_original),
        _number(table.converted),
        figures(fixed, ours, objective, decode) if decode else (),
        tuple((level.against_original, level.converted) for level in levels),
    )


def answers(net: Bound, fixed: Fixed, objective: Objective, device: torch.device | str) -> Tensor:
    """The answers (10 V, C, h, w) of a network, float32 on the CPU."""
    size = max(1, POSITIONS // fixed.x0[0, 0].numel())
    found = []
    for first in range(0, len(fixed), size):
        rows = slice(first, first + size)
        t, which = fixed.t[rows], torch.arange(len(fixed))[rows] % len(fixed.x0)
        x = objective.noise(fixed.data(rows), fixed.eps[rows], t)
        bound = net(fixed.condition[which])
        found.append(bound(x.to(device), t.to(device)).float().cpu())
    return torch.cat(found)


def figures(
    fixed: Fixed, answer: Tensor, objective: Objective, decode: Decode
) -> tuple[float, ...]:
    """The NAMES of the x0-hats that answers imply at LOOKED, decoded from the latents' middle."""
    rows = slice(LOOKED * len(fixed.x0), (LOOKED + 1) * len(fixed.x0))
    t = fixed.t[rows]
    x = objective.noise(fixed.data(rows), fixed.eps[rows], t)
    x0, _ = objective.split(x, answer[rows], t)
    if not x0.isfinite().all():
        return (math.nan,) * len(NAMES)
    top, left = (max(0, side - CROP) // 2 for side in x0.shape[-2:])
    pictures = decode(x0[..., top : top + CROP, left : left + CROP]).float().cpu().clamp(-1, 1)
    if not pictures.isfinite().all():
        return (math.nan,) * len(NAMES)
    measures = (total_variation, colour_entropy, spectrum_slope)
    return tuple(measure(pictures).mean().item() for measure in measures)


def write_fixed(path: Path, fixed: Fixed, metadata: dict[str, str]) -> None:
    """Write the set as a safetensors file."""
    tensors = {
        name: getattr(fixed, name) for name in ("x0", "eps", "t", "covered", "answer", "figures")
    }
    write_dict(path, tensors | pack(fixed.condition), metadata, force=True)


def read_fixed(path: Path) -> Fixed:
    """Read what `write_fixed` wrote."""
    with Checkpoint(path) as file:
        held = {name: file[name] for name in file}
    condition = unpack(held)
    return Fixed(**{name: held[name] for name in held if "." not in name}, condition=condition)


def pack(condition: Condition, prefix: str = "condition") -> dict[str, Tensor]:
    """A condition as named tensors."""
    values = {"context": condition.context, "pooled": condition.pooled, "sizes": condition.time_ids}
    return {f"{prefix}.{k}": v.cpu().contiguous() for k, v in values.items() if v is not None}


def unpack(held: dict[str, Tensor], prefix: str = "condition") -> Condition:
    """The condition that `pack` took apart."""
    return Condition(
        held[f"{prefix}.context"], held.get(f"{prefix}.pooled"), held.get(f"{prefix}.sizes")
    )


def _number(value: float | None) -> float:
    return math.nan if value is None else value
