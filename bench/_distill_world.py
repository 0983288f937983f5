"""The small world of bench/distill: scenes of the pocket world, a tiny UNet, and its teacher.

x0 (3, 8, 8) are the pocket world's pictures, each pixel the mean of 8x8 of theirs. The UNet has
seven blocks like SDXL's (three down, mid, three up) of 16, 32 and 48 channels and is told the
scene's five attributes as a sum of embeddings beside its time. The teacher predicts eps on Stable
Diffusion's betas; it is trained once, kept in half precision and pinned by its hash.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recast.checkpoint import Checkpoint, write_dict
from recast.commit import lock
from recast.errors import Refused
from recast.objective import EPS, Net
from recast.objective import Path as Noising
from recast.pocket.world import ATTRIBUTES, Scene, labels, render, scenes

if TYPE_CHECKING:
    from torch import nn

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "runs" / "bench-distill"
TEACHER = ROOT / "bench" / "results" / "distill-teacher.safetensors"
PICTURES = {"train": 2000, "held": 500}
MEAN, DEVIATION = 0.05, 0.35
WIDTH = sum(len(names) for names in ATTRIBUTES.values())
STEPS, BATCH, RATE = 1600, 32, 3e-3
SILENT = 0.1  # of the samples are shown without their scene


@dataclass(frozen=True)
class World:
    """Pictures (N, 3, 8, 8) and what they show, (N, 28): ones at the five attributes."""

    x0: Tensor
    shown: Tensor
    scenes: tuple[Scene, ...]


@contextmanager
def turn(folder: Path) -> Iterator[None]:
    """Hold a folder; where another process has it, wait for it."""
    with ExitStack() as held:
        while True:
            try:
                held.enter_context(lock(folder))
                break
            except Refused:
                time.sleep(1)
        yield


def world(split: str) -> World:
    """The pictures of a split, drawn once; the held-out ones from other seeds."""
    folder = RUNS / f"world-{split}"
    with turn(folder):
        count, seed = PICTURES[split], list(PICTURES).index(split)
        chosen = tuple(random.Random(f"{seed}/scenes").choices(scenes(held=False), k=count))
        file = folder / f"{count}.safetensors"
        if not file.exists():
            generator = torch.Generator().manual_seed(seed)
            parts = [small(render(chosen[k : k + 100], generator)) for k in range(0, count, 100)]
            write_dict(file, {"x0": torch.cat(parts)}, {})
        with Checkpoint(file) as stored:
            return World(stored["x0"], shown(chosen), chosen)


def small(pictures: Tensor) -> Tensor:
    """Pictures (B, 3, 64, 64) as x0 (B, 3, 8, 8): means of 8x8 pixels, about unit variance."""
    return (torch.nn.functional.avg_pool2d(pictures, 8) - MEAN) / DEVIATION


def visible(x0: Tensor) -> Tensor:
    """x0 as pictures (B, 3, 8, 8) in [-1, 1]."""
    return (x0 * DEVIATION + MEAN).clamp(-1, 1)


def shown(batch: tuple[Scene, ...]) -> Tensor:
    """Ones at each scene's attributes, (B, 28)."""
    hot = [
        torch.nn.functional.one_hot(index, len(ATTRIBUTES[name]))
        for name, index in labels(batch).items()
    ]
    return torch.cat(hot, 1).float()


def tiny_unet(seed: int = 0) -> nn.Module:
    """A UNet of seven blocks, 0.4 million parameters."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        down_block_types=("DownBlock2D",) * 3,
        mid_block_type="UNetMidBlock2D",
        up_block_types=("UpBlock2D",) * 3,
        block_out_channels=(16, 32, 48),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=8,
        cross_attention_dim=32,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=WIDTH,
    )


def bound(unet: nn.Module, path: Noising, scene: Tensor) -> Net:
    """The UNet as a net that is shown scenes (B, 28)."""

    def net(x: Tensor, t: Tensor) -> Tensor:
        answer: Any = unet(x, path.embed(t), None, class_labels=scene)
        return answer.sample

    return net


def teacher() -> tuple[nn.Module, str]:
    """The frozen teacher and its hash; trained first if there is none."""
    with turn(RUNS / "teacher"):
        if not TEACHER.exists():
            unet = tiny_unet()
            for step, loss in enumerate(fit(unet, world("train"))):
                if step % 100 == 0:
                    print(f"teacher {step}: {loss:.4f}", flush=True)
            halves = {key: value.half() for key, value in unet.state_dict().items()}
            write_dict(TEACHER, halves, {"about": "teacher of bench/distill"})
    unet = tiny_unet()
    with Checkpoint(TEACHER) as stored:
        unet.load_state_dict({key: stored[key].float() for key in stored})
        return unet.eval().requires_grad_(False), stored.sha256()


def fit(unet: nn.Module, data: World) -> Iterator[float]:
    """Train the teacher in place; at the end it holds the running mean of its weights."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=RATE, weight_decay=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, STEPS, pct_start=0.05)
    weights = list(unet.parameters())
    mean = [p.detach().clone() for p in weights]
    for step in range(STEPS):
        rows = torch.randint(len(data.x0), (BATCH,), generator=generator)
        t = (torch.arange(BATCH) + torch.rand(BATCH, generator=generator)) / BATCH
        heard = torch.rand(BATCH, 1, generator=generator) >= SILENT
        eps = torch.randn(data.x0[rows].shape, generator=generator)
        x = EPS.noise(data.x0[rows], eps, t)
        answer = bound(unet, EPS.path, data.shown[rows] * heard)(x, t)
        loss = (answer - eps).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            torch._foreach_lerp_(mean, weights, max(1 / (step + 1), 0.002))
        yield loss.item()
    with torch.no_grad():
        for parameter, averaged in zip(weights, mean, strict=True):
            parameter.copy_(averaged)
