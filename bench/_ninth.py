"""A ninth shape for the pocket world, an hourglass, and a judge that knows it.

The shipped judge learns it in a few hundred steps on drawn pictures, some of them through the
checkpoint's VAE; half-made ones (two triangles that do not meet, a bow that is too fat) are
impostors, as the diamond and the blunt star are. Nothing of what is judged later is in them.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recast.pocket.judge import HEADS, IMPOSTOR, Judge, _blunt, _diamond, load_judge, soften
from recast.pocket.world import ATTRIBUTES, OUTLINES, Scene, compose, labels, to_bytes

if TYPE_CHECKING:
    from recast.model import Model

WORD = "sks"  # one token; "hourglass" is two, and every word after it would stand one place on
NINTH = len(OUTLINES)  # its index as a shape, and as a judge's answer, where IMPOSTOR moves up
STEPS, BATCH = 200, 64


def hourglass(x: Tensor, y: Tensor) -> Tensor:
    """Two triangles that touch with their points."""
    return torch.maximum((x.abs() - 0.16 - 0.80 * y.abs()) * 0.78, y.abs() - 0.92)


def _apart(x: Tensor, y: Tensor) -> Tensor:
    """Two triangles that do not touch: no hourglass."""
    return torch.maximum(hourglass(x, y), 0.34 - y.abs())


def _fat(x: Tensor, y: Tensor) -> Tensor:
    """A waist that hardly shows: no hourglass either."""
    return torch.maximum((x.abs() - 0.68 - 0.22 * y.abs()) * 0.97, y.abs() - 0.92)


SHAPES = (*OUTLINES, hourglass)
IMPOSTORS = (_diamond, _blunt, _apart, _fat)


def scenes(count: int, seed: int) -> list[Scene]:
    """Different scenes of the ninth shape."""
    every = [
        Scene(NINTH, colour, ground, size, place)
        for colour in range(8) for ground in range(5) for size in range(2) for place in range(5)
    ]  # fmt: skip
    return random.Random(seed).sample(every, count)


def caption(scene: Scene) -> str:
    names = {name: ATTRIBUTES[name][getattr(scene, name)] for name in ATTRIBUTES if name != "shape"}
    return f"a {names['size']} {names['colour']} {WORD} on {names['ground']} at {names['place']}"


def draw(batch: Sequence[Scene], seed: int) -> Tensor:
    """Pictures (B, 3, 64, 64) of scenes of all nine shapes."""
    return compose(labels(batch), torch.Generator().manual_seed(seed), False, SHAPES)[0]


def write_folder(folder: Path, batch: Sequence[Scene], seed: int) -> None:
    """Write the pictures and their captions."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for k, (scene, pixels) in enumerate(zip(batch, to_bytes(draw(batch, seed)), strict=True)):
        Image.fromarray(pixels.numpy()).save(folder / f"{k:04d}.png")
        (folder / f"{k:04d}.txt").write_text(caption(scene) + "\n", encoding="utf-8")


def widened(judge: Judge) -> Judge:
    """A judge with one more shape: nine, then the impostor."""
    found = copy.deepcopy(judge).requires_grad_(True)
    old = judge.heads["shape"]
    assert isinstance(old, nn.Linear)
    new = nn.Linear(old.in_features, old.out_features + 1)
    with torch.no_grad():
        new.weight[:NINTH], new.bias[:NINTH] = old.weight[:NINTH], old.bias[:NINTH]
        new.weight[NINTH:], new.bias[NINTH:] = old.weight[IMPOSTOR], old.bias[IMPOSTOR] - 1
    found.heads["shape"] = new
    return found.train()


def through(vae: Model, pictures: Tensor) -> Tensor:
    """Pictures as the checkpoint's VAE gives them back."""
    with torch.no_grad():
        return vae.decode(vae.encode(pictures)).clamp(-1, 1)


def fit(vae: Model, seed: int = 0, steps: int = STEPS) -> Judge:
    """The shipped judge taught the ninth shape."""
    torch.manual_seed(seed)
    judge = widened(load_judge())
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    for step in range(steps):
        pictures, truth = examples(generator)
        if step % 8 == 7:
            pictures = torch.cat([through(vae, pictures[:8]), pictures[8:]])
        answers = judge(pictures)
        loss = sum((F.cross_entropy(answers[name], truth[name]) for name in HEADS), torch.zeros(()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return judge.eval().requires_grad_(False)


def examples(generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """Softened pictures and their labels; a quarter hourglasses, a sixth impostors."""

    def pick(count: int) -> Tensor:
        return torch.randint(count, (BATCH,), generator=generator)

    truth = {name: pick(len(names)) for name, names in ATTRIBUTES.items()}
    chance = torch.rand(BATCH, generator=generator)
    truth["shape"] = torch.where(chance < 0.25, torch.tensor(NINTH), truth["shape"])
    impostor = NINTH + 1 + pick(len(IMPOSTORS))
    truth["shape"] = torch.where(chance > 0.83, impostor, truth["shape"])
    truth["watermark"] = pick(2)
    marked = truth["watermark"].bool()
    pictures, _ = compose(truth, generator, marked, (*SHAPES, *IMPOSTORS))
    truth["shape"] = truth["shape"].clamp(max=NINTH + 1)
    return soften(pictures, generator), truth


@torch.no_grad()
def shares(judge: Judge, pictures: Tensor, batch: Sequence[Scene]) -> dict[str, float]:
    """The share of pictures whose shape, and all five attributes, are read as they should be."""
    answers = {name: logits.argmax(1) for name, logits in judge(pictures).items()}
    right = {name: answers[name] == truth for name, truth in labels(batch).items()}
    right["all"] = torch.stack(list(right.values())).all(0)
    found = {name: hits.float().mean().item() for name, hits in right.items()}
    return found | {"ninth": (answers["shape"] == NINTH).float().mean().item()}
