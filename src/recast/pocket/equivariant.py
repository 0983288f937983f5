"""pocket-eq: pocket-xl's VAE tuned until its decoder answers a turned or shrunken latent alike.

For tau = a scaling to 2/8 .. 8/8 and a rotation by 0, 90, 180 or 270 degrees (EQ-VAE, Kouzelis et
al. 2025, arXiv 2502.09509):
    loss = distance(D(tau z), tau x), z = E(x) plus posterior noise; tau = 1 in half of the steps
Everything needed is in the shipped pocket-xl.  Afterwards its latents are whitened along their own
principal axes, so the result is another latent space with another scale and shift:
    latent of a UNet = (z - SHIFT) SCALE = P (z' - m), z' the latents as they were trained
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from recast.pocket import path, vae
from recast.pocket.files import read_checkpoint
from recast.pocket.stages import Tensors, Workshop

SCALE, SHIFT = 0.5, 0.3
EDGE = 8  # latents are EDGE wide


@dataclass(frozen=True)
class EquivariantRun:
    seed: int = 21
    steps: int = 900
    rate: float = 6e-4
    batch: int = 4
    plain: float = 0.5
    half: bool = True
    keep_every: int = 100


RUN = EquivariantRun()


@dataclass(frozen=True)
class Change:
    """tau: shrink to `edge`/8 of the size, then turn by `turns` right angles."""

    edge: int = EDGE
    turns: int = 0

    def __call__(self, maps: Tensor) -> Tensor:
        """Apply to pictures or latents (B, C, H, H)."""
        if self.edge != EDGE:
            side = maps.shape[-1] * self.edge // EDGE
            maps = F.interpolate(maps, (side, side), mode="bilinear", antialias=True)
        return maps.rot90(self.turns, (2, 3))


SHOWN = (Change(6), Change(4), Change(2), Change(turns=1), Change(turns=2), Change(turns=3))


def draw(generator: torch.Generator, plain: float) -> Change:
    """Return the identity with probability `plain`, else a random change."""
    if float(torch.rand((), generator=generator)) < plain:
        return Change()
    edge = int(torch.randint(2, EDGE + 1, (), generator=generator))
    return Change(edge, int(torch.randint(4, (), generator=generator)))


def loss_of(net: AutoencoderKL, run: EquivariantRun, generator: torch.Generator) -> Tensor:
    """Return the loss of one random batch, pixels of shape, edge and logo weighing 5."""
    x, weight = vae.examples(run.batch, generator)
    tau = draw(generator, run.plain)
    with torch.autocast("cpu", torch.bfloat16, enabled=run.half):
        mean, logvar = (part.float() for part in vae.moments(net, x))
        noise = torch.randn(mean.shape, generator=generator)
        z = mean + torch.exp(0.5 * logvar.clamp(-20, 10)) * noise
        y = vae.decoded(net, tau(z)).float()
    error = y - tau(x)
    return (tau(weight) * (error**2 + 0.1 * error.abs())).mean()


def fit(net: AutoencoderKL, run: EquivariantRun, kept: Path) -> Iterator[float]:
    """Train in place, from the state in `kept` if there is one; yields each step's loss."""
    parameters = list(net.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=run.rate, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = vae.warm_cosine(optimizer, run.steps, warm=50)
    generator, done = torch.Generator().manual_seed(run.seed), 0
    if kept.exists():
        state = torch.load(kept, weights_only=True)
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        generator.set_state(state["generator"])
        done = state["done"]
    yield from [math.nan] * done
    for step in range(done + 1, run.steps + 1):
        yield vae.descend(loss_of(net, run, generator), optimizer, schedule)
        if step % run.keep_every == 0:
            _keep(kept, net, optimizer, schedule, generator, step)


def _keep(
    kept: Path,
    net: AutoencoderKL,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LambdaLR,
    generator: torch.Generator,
    done: int,
) -> None:
    """Save all that the next step depends on."""
    partial = kept.with_suffix(".partial")
    state = {
        "net": net.state_dict(), "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(), "generator": generator.get_state(), "done": done,
    }  # fmt: skip
    torch.save(state, partial)
    partial.rename(kept)


def train(shop: Workshop, run: EquivariantRun = RUN) -> Path:
    """Tune the shipped VAE; the artefact holds it before whitening."""

    def make() -> tuple[Tensors, dict[str, str]]:
        kept = shop.artefact("eq-vae-state", run).with_suffix(".pt")
        net = first().requires_grad_(True)
        for _ in shop.follow("eq-vae", fit(net, run, kept), run.steps, every=100):
            pass
        return net.state_dict(), {}

    return shop.stage("eq-vae", run, (path("pocket-xl"),), make)


def first() -> AutoencoderKL:
    """Return the VAE of the shipped pocket-xl, which is where the tuning starts."""
    return read_checkpoint(path("pocket-xl"), "pocket-xl")[1]
