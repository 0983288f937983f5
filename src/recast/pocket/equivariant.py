"""pocket-eq: pocket-xl's VAE tuned until its decoder answers a turned or shrunken latent alike.

For tau = a scaling to 2/8 .. 8/8 and a rotation by 0, 90, 180 or 270 degrees (EQ-VAE, Kouzelis et
al. 2025, arXiv 2502.09509):
    loss = distance(D(tau z), tau x), z = E(x) plus posterior noise; tau = 1 in half of the steps
Everything needed is in the shipped pocket-xl.  Afterwards the latents are turned onto their own
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

from recast.checkpoint import Checkpoint, write_dict
from recast.layout import detect, from_file, keymap, to_file
from recast.layout.keymap import trace
from recast.layout.latents import VAE_SCALE, VAE_SHIFT
from recast.layout.names import VAE as PREFIX
from recast.layout.vae import exchanged
from recast.pocket import VAE, gate, path, pipeline, vae
from recast.pocket.files import PLANS, read_checkpoint
from recast.pocket.judge import Judge
from recast.pocket.stages import Tensors, Workshop, load_into
from recast.pocket.world import render, scenes

SCALE, SHIFT = 0.5, 0.3
EDGE = 8  # latents are EDGE wide


@dataclass(frozen=True)
class EquivariantRun:
    """Settings of a phase; `plain` is the share of steps without a change."""

    seed: int = 21
    steps: int = 900
    rate: float = 6e-4
    batch: int = 4
    plain: float = 0.5
    half: bool = True
    keep_every: int = 100


RUN = EquivariantRun()
DECODER = EquivariantRun(seed=22, steps=800, rate=8e-4, plain=0.75)


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


def loss_of(
    net: AutoencoderKL, run: EquivariantRun, generator: torch.Generator, critic: Judge | None = None
) -> Tensor:
    """Return the loss of one random batch, pixels of shape, edge and logo weighing 5.

    The critic's features are compared where the picture is as it was drawn.
    """
    x, weight = vae.examples(run.batch, generator)
    tau = draw(generator, run.plain)
    with torch.autocast("cpu", torch.bfloat16, enabled=run.half):
        mean, logvar = (part.float() for part in vae.moments(net, x))
        noise = torch.randn(mean.shape, generator=generator)
        z = mean + torch.exp(0.5 * logvar.clamp(-20, 10)) * noise
        y = vae.decoded(net, tau(z)).float()
    if critic is not None and tau == Change():
        return vae.distance(y, x, weight, critic)
    error = y - tau(x)
    return (tau(weight) * (error**2 + 0.1 * error.abs())).mean()


def fit(
    net: AutoencoderKL, run: EquivariantRun, kept: Path, critic: Judge | None = None
) -> Iterator[float]:
    """Train what asks for gradients, from the state in `kept` if there is one; yields losses."""
    parameters = [each for each in net.parameters() if each.requires_grad]
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
        yield vae.descend(loss_of(net, run, generator, critic), optimizer, schedule)
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


def finish(shop: Workshop, trained: Path, run: EquivariantRun = DECODER) -> Path:
    """Train the decoder on, the encoder frozen, with the pipeline's critic."""
    critic = pipeline.train_judge(shop, "critic", pipeline.CRITIC)

    def make() -> tuple[Tensors, dict[str, str]]:
        kept = shop.artefact("eq-decoder-state", run, (trained, critic)).with_suffix(".pt")
        eye = load_into(Judge(), critic).requires_grad_(False)
        net = load_into(vae.build(), trained).requires_grad_(False)
        for part in (net.decoder, net.post_quant_conv):
            part.requires_grad_(True)
        for _ in shop.follow("eq-decoder", fit(net, run, kept, eye), run.steps, every=100):
            pass
        return net.state_dict(), {}

    return shop.stage("eq-decoder", run, (trained, critic), make)


def first() -> AutoencoderKL:
    """Return the VAE of the shipped pocket-xl, which is where the tuning starts."""
    return read_checkpoint(path("pocket-xl"), "pocket-xl")[1]


@torch.no_grad()
def settle(net: AutoencoderKL, seed: int = 23, count: int = 512) -> None:
    """Turn the latents onto their principal axes, to deviation 1 / SCALE around SHIFT, in place.

    One gain for all axes: what a VAE tuned elsewhere has, and what keeps noise white on the way.
    """
    order = torch.randperm(2240, generator=torch.Generator().manual_seed(seed))[:count].tolist()
    pool = scenes(held=False)
    z = vae.encode(net, render([pool[k] for k in order], torch.Generator().manual_seed(seed)))
    flat = z.double().movedim(1, 0).flatten(1)
    _, axes = torch.linalg.eigh(flat.cov())
    largest = axes.abs().argmax(0)
    axes = axes * axes[largest, torch.arange(4)].sign()
    matrix = (axes.T / (flat - flat.mean(1, keepdim=True)).std()).float()
    vae.fold(net, flat.mean(1).float(), matrix, SCALE)
    net.quant_conv.bias[:4] += SHIFT
    net.post_quant_conv.bias -= SHIFT * net.post_quant_conv.weight.sum((1, 2, 3))


def ship(trained: Path) -> str:
    """Write the shipped file in half precision, under ldm's names; returns its sha256."""
    net = load_into(vae.build(), trained)
    settle(net)
    named = to_file(trace(PLANS["pocket-xl"]), {"vae": net.state_dict()})
    tensors = {key.removeprefix(PREFIX): value.half().contiguous() for key, value in named}
    metadata = {"modelspec.title": VAE.stem, VAE_SCALE: str(SCALE), VAE_SHIFT: str(SHIFT)}
    return write_dict(VAE, tensors, metadata, force=True)


def measure(shop: Workshop, count: int = 160) -> None:
    """Say what the shipped VAE and the first one are worth, and how equivariant they are."""
    with (
        Checkpoint(path("pocket-xl")) as original,
        exchanged(original, VAE, None, None, fold=True) as other,
    ):
        found = (fresh(original), fresh(other))
    for name, net in zip(("first", VAE.stem), found, strict=True):
        for held in (False, True):
            batch = gate.sample(held, count, pipeline.GATE.seed)
            figures, _ = vae.ceiling(net, batch, pipeline.GATE.seed)
            shop.say(f"{name}: {'held' if held else 'seen'} {gate.text(figures)}")
        shop.say(f"{name}: {answers(net)}")


def fresh(checkpoint: Checkpoint) -> AutoencoderKL:
    """Return the VAE of a checkpoint, frozen, in full precision."""
    net = vae.build()
    tensors = from_file(keymap(detect(checkpoint)), checkpoint, "vae")
    net.load_state_dict({name: tensor.float() for name, tensor in tensors})
    return net.eval().requires_grad_(False)


def answers(net: AutoencoderKL, count: int = 64) -> str:
    """Return how near D(tau z) comes to tau x for each change, PSNR in dB, as one line."""
    batch = gate.sample(None, count, 7)
    x = render(batch, torch.Generator().manual_seed(7))
    z = vae.encode(net, x)
    told = []
    for tau in SHOWN:
        error = F.mse_loss(vae.decode(net, tau(z)), tau(x)).item()
        what = f"{tau.edge}/{EDGE}" if tau.edge != EDGE else f"{90 * tau.turns} degrees"
        told.append(f"{what} {10 * math.log10(4 / error):.2f} dB")
    return ", ".join(told)


def make(shop: Workshop) -> None:
    """Run what is missing of the recipe, and measure its result."""
    digest = ship(finish(shop, train(shop)))
    shop.say(f"{VAE.stem}: sha256 {digest}")
    measure(shop)
