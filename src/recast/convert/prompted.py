"""Previews of a prompts file: each line's own size, seed, steps, guidance and sampler.

    watch/prompts.safetensors                 the conditions, encoded before training
    previews/step00000100-00-seed42.png       what line 0 shows after step 100

The sampler is that of the objective which is being trained. Where text encoders are trained too,
lines are encoded as these are by then.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import torch
from torch import Tensor

from recast.checkpoint import Checkpoint, write_dict
from recast.commit import commit
from recast.convert.folder import Folder
from recast.errors import Refused
from recast.evaluate.bound import noises
from recast.evaluate.pictures import png
from recast.evaluate.validation import pack, unpack
from recast.recipe import Recipe
from recast.sample.images import sample_latents
from recast.sample.prompts import Prompt, read_prompts
from recast.sample.solvers import find_solver
from recast.text.encode import Condition, cat
from recast.timesteps import grid

if TYPE_CHECKING:
    from recast.model import Model
    from recast.objective import Objective

FILE = "watch/prompts.safetensors"
LINES = "recast.lines"  # the file may change while a run is interrupted
MOST = 64  # of them


@dataclass(frozen=True)
class Line:
    """A prompt with nothing left open, and its condition; `negative` None without guidance."""

    prompt: Prompt
    condition: Condition
    negative: Condition | None


def lines_of(recipe: Recipe) -> tuple[Prompt, ...]:
    """The lines of the recipe's prompts file, each with what it leaves open filled in but its size.

    Raises Refused for a file that cannot be read, an unknown sampler, and too many lines.
    """
    found = read_prompts(recipe.watch.prompts)
    if len(found) > MOST:
        raise Refused(f"{recipe.watch.prompts} has {len(found)} prompts: {MOST} at most.")
    usual = recipe.watch.preview_solver or recipe.evaluate.solver
    made = []
    for k, line in enumerate(found):
        find_solver(line.solver or usual)
        made.append(
            replace(
                line,
                negative=line.negative or "",
                seed=recipe.evaluate.seed + k if line.seed is None else line.seed,
                scale=recipe.evaluate.guidance if line.scale is None else line.scale,
                steps=line.steps or recipe.watch.preview_steps,
                solver=line.solver or usual,
                shift=line.shift or 1.0,
            )
        )
    return tuple(made)


def check(recipe: Recipe) -> None:
    """Refuse a prompts file that previews could not be painted from."""
    if recipe.watch.prompts:
        lines_of(recipe)


def prepare(model: Model, folder: Folder, recipe: Recipe) -> None:
    """Write the conditions of all lines, unless this run has those of the very same already."""
    if not recipe.watch.prompts:
        return
    lines = lines_of(recipe)
    if folder.has(FILE):
        with Checkpoint(folder.path(FILE)) as file:
            if file.metadata.get(LINES) == repr(lines):
                return
    tensors: dict[str, Tensor] = {}
    for k, prompt in enumerate(lines):
        line = encoded(model, prompt, recipe)
        tensors |= pack(line.condition, f"line{k}")
        if line.negative is not None:
            tensors |= pack(line.negative, f"without{k}")
    write_dict(folder.path(FILE), tensors, {**folder.stamp(), LINES: repr(lines)}, force=True)


@torch.no_grad()
def encoded(model: Model, prompt: Prompt, recipe: Recipe) -> Line:
    """A line with its conditions, by the model's text encoders as they are."""
    size = prompt.size or recipe.data.size or None
    model.latent_shape(size)
    positive = model.condition([prompt.text], size=size)
    if prompt.scale == 1:
        return Line(prompt, positive, None)
    return Line(prompt, positive, model.condition([prompt.negative or ""], size=size))


def read(root: Path, recipe: Recipe) -> tuple[Line, ...]:
    """The lines with the conditions that `prepare` wrote."""
    with Checkpoint(root / FILE) as file:
        held = {name: file[name] for name in file}
    return tuple(
        Line(
            prompt,
            unpack(held, f"line{k}"),
            unpack(held, f"without{k}") if f"without{k}.context" in held else None,
        )
        for k, prompt in enumerate(lines_of(recipe))
    )


def paint(
    model: Model, objective: Objective, recipe: Recipe, lines: tuple[Line, ...]
) -> Iterator[tuple[Line, Tensor]]:
    """Every line with its picture (3, H, W) by the network as it is now."""
    live = all(name in model.parts for name in model.text_parts)
    for line in lines:
        yield (
            line,
            picture(
                model, objective, recipe, encoded(model, line.prompt, recipe) if live else line
            ),
        )


@torch.no_grad()
def picture(model: Model, objective: Objective, recipe: Recipe, line: Line) -> Tensor:
    """One line's picture, (3, H, W) in [-1, 1] on the CPU."""
    prompt = line.prompt
    assert prompt.seed is not None
    assert prompt.scale is not None
    size = prompt.size or recipe.data.size or None
    asked = line.condition if line.negative is None else cat([line.condition, line.negative])
    x = noises(model.latent_shape(size), [prompt.seed]).to(model.device)
    for step in sample_latents(
        model.net(asked, objective), objective, x,
        grid(objective.path, prompt.steps or 1, shift=prompt.shift or 1.0), scale=prompt.scale,
        solver=prompt.solver or "euler", paired=line.negative is not None,
        generator=[torch.Generator().manual_seed(prompt.seed)],
    ):  # fmt: skip
        x = step.x
    return model.decode(x).float().clamp(-1, 1).cpu()[0]


def write_previews(root: Path, step: int, made: Iterator[tuple[Line, Tensor]]) -> tuple[Path, ...]:
    """Write a PNG for every line and return their paths."""
    folder = root / "previews"
    folder.mkdir(exist_ok=True)
    paths = []
    for k, (line, image) in enumerate(made):
        data = png(image)
        path = folder / f"step{step:08d}-{k:02d}-seed{line.prompt.seed}.png"
        commit(path, partial(_into, data), size=len(data), force=True)
        paths.append(path)
    return tuple(paths)


def _into(data: bytes, file: BinaryIO) -> None:
    file.write(data)
