"""Text to images: prompts and seeds in, pictures out, the same on every device and in every batch.

A picture's noise, the first and any later, comes from a CPU generator with the picture's own seed.
"""

from collections.abc import Iterator, MutableSequence, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Generator, Tensor

from recast.errors import Refused
from recast.objective import Net, Objective, express, start
from recast.sample.guidance import Met, guided, plain
from recast.sample.prompts import Prompt
from recast.sample.solvers import Generators, find_solver
from recast.timesteps import grid

POSITIONS = 16384  # latent positions sampled at once at most: 1 picture of 1024 pixels, 4 of 512
AHEAD = 8  # batches that an accelerator makes before it decodes them
Size = tuple[int, int]
"""(height, width) in pixels."""


class Painter(Protocol):
    """What sampling needs of a model; `recast.model.Model` is one."""

    objective: Objective

    @property
    def device(self) -> torch.device: ...

    def condition(self, prompts: Sequence[str], *, size: Any = None) -> Any: ...

    def net(self, condition: Any) -> Net: ...

    def decode(self, latents: Tensor) -> Tensor: ...

    def latent_shape(self, size: Any = None) -> tuple[int, int, int]: ...


@dataclass(frozen=True)
class Step:
    """One step of a sampler, `index` from 0: the sample after it, and every state asked in it.

    `met` has one entry for single-call solvers, two for Heun and DPM-Solver++(2S); the first is the
    sample the step began with. All in the coordinates of the objective that was sampled.
    """

    index: int
    t: float
    x: Tensor
    met: tuple[Met, ...]


@dataclass(frozen=True)
class Picture:
    index: int
    prompt: str
    seed: int
    image: Tensor  # (3, H, W) in [-1, 1], float32 on the CPU


@torch.no_grad()
def sample_latents(
    net: Net,
    objective: Objective,
    eps: Tensor,
    times: Tensor,
    *,
    scale: float = 1.0,
    solver: str = "euler",
    paired: bool | None = None,
    generator: Generators = None,
) -> Iterator[Step]:
    """From noise eps (B, C, h, w) along `times`, a Step each; the last Step's x is the sample.

    A paired net is bound to 2 B conditions, the positive ones first, any other to B; unless told,
    it is paired if the scale is not 1. Pair it at scale 1 to have both answers in `met`. `times`
    need not come from `timesteps.grid`: any that fall strictly, from anywhere, will do.
    """
    met: list[Met] = []
    paired = scale != 1 if paired is None else paired
    denoise = guided(net, objective, scale, met=met) if paired else plain(net, objective, met=met)
    x = start(objective.path, eps, float(times[0]))
    run = find_solver(solver)(denoise, objective.path, x, times, generator=generator)
    for index, x in enumerate(run):
        yield Step(index, float(times[index + 1]), x, tuple(met))
        met.clear()


@torch.no_grad()
def sample_images(
    model: Painter,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    negative: str | Sequence[str] = "",
    steps: int = 25,
    solver: str = "euler",
    scale: float = 3.0,
    as_objective: Objective | None = None,
    shift: float = 1.0,
    size: Size | None = None,
    spacing: str | None = None,
    batch: int = 8,
    ahead: int | None = None,
    trace: MutableSequence[Step] | None = None,
) -> Iterator[Picture]:
    """Pictures of the prompts, one seed each, in order; decoded as soon as their batch is done.

    `batch` is the most that is sampled at once, fewer where pictures are large. On an accelerator
    networks may take turns (see recast.model.parts): `ahead` batches are encoded, then sampled,
    then decoded.

    With `as_objective` the model is sampled as if it had been trained for that one, exactly and
    without training. Steps are appended to `trace`, batch after batch, as they are made. Raises
    Refused for unknown names or unequal numbers of prompts and seeds.
    """
    negatives = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
    if not len(prompts) == len(seeds) == len(negatives):
        raise Refused(
            f"{len(prompts)} prompts, {len(seeds)} seeds and {len(negatives)} negative prompts:"
            " give one seed and one negative prompt for each prompt"
        )
    objective = as_objective or model.objective
    times = grid(objective.path, steps, shift=shift, spacing=spacing)
    shape = model.latent_shape(size)
    at_once = max(1, min(batch, POSITIONS // (shape[1] * shape[2])))
    every = [slice(first, first + at_once) for first in range(0, len(prompts), at_once)]

    def encoded(rows: slice) -> Any:
        unwanted = [] if scale == 1 else negatives[rows]
        return model.condition([*prompts[rows], *unwanted], size=size)

    def sampled(rows: slice, condition: Any) -> Tensor:
        generators = [Generator().manual_seed(seed) for seed in seeds[rows]]
        eps = torch.stack([torch.randn(shape, generator=each) for each in generators])
        net = express(model.net(condition), model.objective, objective)
        for step in sample_latents(
            net, objective, eps.to(model.device), times, scale=scale, solver=solver,
            generator=generators,
        ):  # fmt: skip
            if trace is not None:
                trace.append(step)
        return step.x

    turns = ahead or (1 if model.device.type == "cpu" else AHEAD)
    for first in range(0, len(every), turns):
        some = every[first : first + turns]
        conditions = [encoded(rows) for rows in some]
        latents = [sampled(*pair) for pair in zip(some, conditions, strict=True)]
        for rows, x in zip(some, latents, strict=True):
            images = model.decode(x).float().clamp(-1, 1).cpu()
            for i, row in enumerate(zip(prompts[rows], seeds[rows], images, strict=True)):
                yield Picture(rows.start + i, *row)


def sample_prompts(
    model: Painter, prompts: Sequence[Prompt], *, seed: int = 0, **defaults: Any
) -> Iterator[Picture]:
    """Pictures of a prompts file: each line's own settings over the defaults of `sample_images`.

    A line without a seed gets `seed` plus its index. Lines that follow each other with equal
    settings share batches.
    """

    def settings(row: tuple[int, Prompt]) -> dict[str, Any]:
        each = row[1]
        own = {
            "steps": each.steps,
            "solver": each.solver,
            "scale": each.scale,
            "shift": each.shift,
            "size": each.size,
        }
        return defaults | {name: value for name, value in own.items() if value is not None}

    negative = defaults.pop("negative", "")
    for common, group in groupby(enumerate(prompts), key=settings):
        rows = list(group)
        pictures = sample_images(
            model,
            [each.text for _, each in rows],
            seeds=[seed + i if each.seed is None else each.seed for i, each in rows],
            negative=[negative if each.negative is None else each.negative for _, each in rows],
            **common,
        )
        for picture in pictures:
            yield replace(picture, index=rows[picture.index][0])
