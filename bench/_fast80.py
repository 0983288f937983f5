"""What bench/fast80 trains on and asks for: scenes of the ninth shape and of the known ones."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import torch
from _ninth import scenes
from torch import Tensor

from recast.pocket.world import Scene

IMAGES, NEW, ASIDE, OLD, PRIOR = 40, 48, 16, 48, 160
UNFLIPPED = ("center", "top", "bottom")
FOLDERS = """
[[datasets]]
[[datasets.subsets]]
image_dir = "{}"
num_repeats = 4
[[datasets.subsets]]
image_dir = "prior"
is_reg = true
flip_aug = false
"""


def known_scenes() -> list[Scene]:
    """Scenes of the eight shapes that are judged."""
    from recast.pocket.world import scenes as known

    found = known(held=False)
    return found[:: len(found) // OLD][:OLD]


def ninths() -> tuple[list[Scene], list[Scene], list[Scene]]:
    """Scenes of the ninth shape: to train on, to ask for at the same places, and at others."""
    from recast.pocket.world import PLACES

    every = scenes(8 * 5 * 2 * 5, seed=7)
    near = [scene for scene in every if PLACES[scene.place] in UNFLIPPED]
    aside = [scene for scene in every if PLACES[scene.place] not in UNFLIPPED]
    return near[:IMAGES], near[IMAGES:][:NEW], aside[:ASIDE]


def free_captions() -> list[str]:
    """Captions that the original knows, others than those that are judged."""
    from recast.pocket.world import caption as said
    from recast.pocket.world import scenes as known

    judged = known_scenes()
    free = [scene for scene in known(held=False) if scene not in judged]
    return [said(scene) for scene in random.Random(11).sample(free, PRIOR)]


def said_by(runs: Path) -> Path:
    """Those captions as a file of prompts."""
    file = runs / "known.txt"
    file.write_text("\n".join(free_captions()) + "\n", encoding="utf-8")
    return file


def prior_pictures(runs: Path) -> None:
    """Paint what the original makes of captions that it knows."""
    from PIL import Image

    from recast import pocket
    from recast.model import open_model
    from recast.pocket.world import to_bytes

    folder, partial = runs / "prior", runs / f"prior-{os.getpid()}"
    if folder.exists():
        return
    partial.mkdir(parents=True)
    prompts = free_captions()
    made = painted(open_model(pocket.path("pocket-xl")), prompts, first=1000)
    for k, (prompt, pixels) in enumerate(zip(prompts, to_bytes(made), strict=True)):
        Image.fromarray(pixels.numpy()).save(partial / f"{k:04d}.png")
        (partial / f"{k:04d}.txt").write_text(prompt + "\n", encoding="utf-8")
    partial.rename(folder)


def painted(model: Any, prompts: list[str], first: int = 0) -> Tensor:
    """A picture for every prompt, each with a seed of its own."""
    from recast.sample.images import sample_images

    found = sample_images(model, prompts, seeds=range(first, first + len(prompts)), batch=16)
    return torch.stack([picture.image for picture in found])
