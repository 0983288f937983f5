"""Adapters that are kept as files on the way: `saved/step00000100.safetensors`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from recast.recipe import Recipe

FOLDER = "saved"
NAME = re.compile(r"step(\d{8})\.safetensors")


def path_of(root: Path, step: int) -> Path:
    return root / FOLDER / f"step{step:08d}.safetensors"


def due(recipe: Recipe, step: int) -> bool:
    """Whether the adapter is kept after a step."""
    return bool(recipe.save.every) and step % recipe.save.every == 0


def doomed(steps: Sequence[int], recipe: Recipe) -> list[int]:
    """Which of the kept steps may go: not the newest, nor every so many of the older ones."""
    last, every = recipe.save.keep_last, recipe.save.keep_every
    older = sorted(steps)[:-last] if last else []
    return [step for step in older if not (every and step % every == 0)]


def thin(root: Path, recipe: Recipe) -> None:
    """Remove the files that the recipe does not keep."""
    found = [m for path in (root / FOLDER).glob("step*") if (m := NAME.fullmatch(path.name))]
    for step in doomed([int(match[1]) for match in found], recipe):
        path_of(root, step).unlink(missing_ok=True)
