"""How far an adapter's modules have moved over the saved steps of a run.

    |dW|_m = |s B A - s0 B0 A0|     Frobenius, from the thin factors; B0 A0 is 0 for a change

against the start, or against the saved step before. The start of a principal adapter is its initial
file, without which its numbers say nothing about training.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from recast.adapter.formats import FULL_SUFFIXES, open_raw, plain_factors
from recast.adapter.places import Place
from recast.checkpoint import Checkpoint
from recast.errors import Refused
from recast.layout import Layout, detect
from recast.layout.peft import adapter_files, is_peft_folder
from recast.lowrank import LowRank, difference, squared_norm
from recast.surgery.blocks import architecture, spot

PLACES = ("saved", "adapters", ".")  # where a run keeps the steps, in its folder
STEP = re.compile(r"(\d+)\D*$")
INITIAL = "initial"


@dataclass(frozen=True)
class Saved:
    """One file of a run and the step it was written after."""

    path: Path
    step: int


@dataclass(frozen=True)
class Track:
    """Norms of the change of every module at every step, and of the base where it is known."""

    steps: tuple[int, ...]
    blocks: Mapping[str, str]
    norms: Mapping[str, tuple[float, ...]]
    base: Mapping[str, float]

    def squares(self, index: int) -> Iterator[tuple[str, float]]:
        """(block, squared norm) of every module at a step."""
        return ((self.blocks[lora], norms[index] ** 2) for lora, norms in self.norms.items())


def saved_steps(paths: Sequence[Path]) -> tuple[list[Saved], Path | None]:
    """The adapter files of a run's folder, or those given, by step; and its initial adapter.

    The step is the file's own word, else the last number of its name. Raises Refused for a folder
    without files, a file without a step, and a step twice.
    """
    files, initial = [], None
    for path in paths:
        if path.is_dir() and not is_peft_folder(path):
            found = next((some for place in PLACES if (some := _numbered(path / place))), [])
            start = path / f"{INITIAL}.safetensors"
            initial = start if start.is_file() else initial
            if not found:
                raise Refused(
                    f"{path} holds no adapter with a step in its name, such as "
                    "saved/step00000100.safetensors: set save.every in the recipe, or name files."
                )
            files += found
        else:
            files.append(path)
    steps = sorted((Saved(path, _step(path)) for path in files), key=lambda each: each.step)
    for one, other in pairwise(steps):
        if one.step == other.step:
            raise Refused(f"{one.path} and {other.path} are both of step {one.step}: give one.")
    return steps, initial


def track(
    saved: Sequence[Saved],
    *,
    initial: Path | None = None,
    model: Checkpoint | None = None,
    each: bool = False,
) -> Track:
    """Norms of the change at every step; each: since the saved step before, from the second on.

    Raises Refused for fewer than two files, files of different modules, and a principal adapter
    without its initial one.
    """
    if len(saved) < 2:
        raise Refused(f"{len(saved)} saved steps show no change over time: give two or more.")
    layout = detect(model) if model else None
    norms: dict[str, list[float]] = {}
    metadata: Mapping[str, str] = {}
    shown = saved[1:] if each else saved
    starts = [one.path for one in saved[:-1]] if each else [initial] * len(saved)
    for now, before in zip(shown, starts, strict=True):
        found, metadata = _norms(now.path, before, layout)
        if norms and found.keys() != norms.keys():
            raise Refused(
                f"{now.path} has other modules than {saved[0].path}, such as "
                f"{min(found.keys() ^ norms.keys())}: give the files of one run."
            )
        for lora, value in found.items():
            norms.setdefault(lora, []).append(value)
    plan = layout.plan if layout else architecture(norms, metadata, str(saved[0].path))
    spots = {lora: spot(lora, plan.unet.layers) for lora in norms}
    blocks = {lora: where.block for lora, where in spots.items() if where}
    if lost := sorted(norms.keys() - blocks.keys()):
        raise Refused(f"{saved[0].path}: {lost[0]} lies in no block; give the model with --model.")
    base = _base(model, layout, norms) if model and layout else {}
    return Track(
        tuple(now.step for now in shown),
        blocks,
        {lora: tuple(found) for lora, found in norms.items()},
        base,
    )


def _norms(
    path: Path, before: Path | None, layout: Layout | None
) -> tuple[dict[str, float], Mapping[str, str]]:
    """Norms of the modules of a file, against another's or against nothing."""
    with ExitStack() as files:
        raw = files.enter_context(open_raw(path, layout))
        role = raw.metadata.get("recast.role", "delta")
        if role.startswith("pissa-") and before is None:
            raise Refused(
                f"{path} is a {role} adapter, which begins as a part of the model: name the one "
                "training began with, --initial initial.safetensors."
            )
        start = files.enter_context(open_raw(before, layout)).modules if before else {}
        return {
            lora: math.sqrt(_square(path, lora, tensors, start.get(lora, {})))
            for lora, tensors in raw.modules.items()
        }, raw.metadata


def _square(
    path: Path, lora: str, now: Mapping[str, Tensor], before: Mapping[str, Tensor]
) -> float:
    """Squared norm of one module's change, with that of its bias."""
    total = 0.0
    if "lora_up.weight" in now:
        factors = _factors(path, lora, now)
        if "lora_up.weight" in before:
            factors = difference(factors, _factors(path, lora, before))
        total += squared_norm(factors)
    for suffix in filter(now.__contains__, FULL_SUFFIXES):
        change = now[suffix].double()
        if suffix in before:
            change = change - before[suffix].double()
        total += change.square().sum().item()
    return max(total, 0.0)


def _factors(path: Path, lora: str, tensors: Mapping[str, Tensor]) -> LowRank:
    up, down = plain_factors(path, lora, tensors)
    scale = tensors["alpha"].double().item() / down.shape[0] if "alpha" in tensors else 1.0
    return LowRank(up.float() * scale, down.float())


def _base(model: Checkpoint, layout: Layout, norms: Mapping[str, object]) -> dict[str, float]:
    """Norms of the weights that the modules change."""
    found: dict[str, float] = {}
    for site in layout.sites("every"):
        if site.lora in norms and site.param == "weight":
            weight = Place("", site).view(model[site.key])
            found[site.lora] = torch.linalg.vector_norm(weight.float()).item()
    return found


def _numbered(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    return [path for path in files if STEP.search(path.stem) and path.stem != INITIAL]


def _step(path: Path) -> int:
    file, _ = adapter_files(path)[0]
    with Checkpoint(file) as source:
        for field in ("recast.step", "ss_steps"):
            if source.metadata.get(field, "").isdecimal():
                return int(source.metadata[field])
    found = STEP.search(path.stem)
    if not found:
        raise Refused(f"{path} says no step: put it into the name, such as step00000100.")
    return int(found[1])
