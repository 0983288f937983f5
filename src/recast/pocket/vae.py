"""The pocket VAE: Stable Diffusion's AutoencoderKL in small, its training, whitening and ceiling.

Loss per picture, with w = 5 on the shape, its edge and the logo and 1 elsewhere:
    mean(w (y - x)^2) + .1 mean(w |y - x|) + critic sum_k mean((f_k(y) - f_k(x))^2) + kl KL
f_k are the feature maps of the critic, a second judge that is never used for measuring.
Whitened latents are M (z - m); the files give M (z - m) / scale, so that scale * latents is white.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from recast.pocket.judge import Judge, agreement
from recast.pocket.world import ATTRIBUTES, Scene, compose, logo, render

LOGVAR_BIAS = -4.0


@dataclass(frozen=True)
class VaeRun:
    """Settings of a phase; `noise`, in deviations of a channel, is the decoder phase's."""

    seed: int
    steps: int
    rate: float
    batch: int = 4
    critic: float = 0.05
    kl: float = 5e-7
    noise: float = 0.05
    half: bool = True


def build() -> AutoencoderKL:
    """Return an untrained VAE: factor 8, 4 channels, two layers per block, 32 groups."""
    net = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 64, 64),
        layers_per_block=2,
        norm_num_groups=32,
        sample_size=64,
    )
    with torch.no_grad():
        net.quant_conv.bias[4:] = LOGVAR_BIAS
    return net


def examples(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return pictures (B, 3, H, W), 15 % watermarked, and pixel weights (B, 1, H, W)."""
    scene = {
        name: torch.randint(len(names), (batch,), generator=generator)
        for name, names in ATTRIBUTES.items()
    }
    marked = torch.rand(batch, generator=generator) < 0.15
    pictures, cover = compose(scene, generator, marked)
    cover = torch.maximum(cover, marked.float()[:, None, None, None] * logo()[1])
    return pictures, 1 + 4 * F.max_pool2d(cover, 3, stride=1, padding=1)


def distance(y: Tensor, x: Tensor, weight: Tensor, critic: Judge, strength: float = 0.05) -> Tensor:
    """Return the reconstruction loss of y against x (module docstring), a scalar."""
    pixels = (weight * ((y - x) ** 2 + 0.1 * (y - x).abs())).mean()
    with torch.no_grad():
        wanted = critic.features(x)
    shown = critic.features(y)
    return pixels + strength * sum(F.mse_loss(a, b) for a, b in zip(shown, wanted, strict=True))


def moments(net: AutoencoderKL, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Return the posterior's mean and log variance, (B, 4, 8, 8) each."""
    return net.quant_conv(net.encoder(pictures)).chunk(2, dim=1)


def decoded(net: AutoencoderKL, z: Tensor) -> Tensor:
    return net.decoder(net.post_quant_conv(z))


def descend(
    loss: Tensor, optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler
) -> float:
    """Take one clipped step; returns the loss."""
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    schedule.step()
    return loss.item()


def warm_cosine(
    optimizer: torch.optim.Optimizer, steps: int, warm: int = 100
) -> torch.optim.lr_scheduler.LambdaLR:
    """Return a schedule that rises over `warm` steps and falls along a cosine to 0."""
    rise = lambda step: min(1.0, (step + 1) / warm)  # noqa: E731
    fall = lambda step: 0.5 * (1 + math.cos(math.pi * step / steps))  # noqa: E731
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rise(step) * fall(step))


def fit(net: AutoencoderKL, critic: Judge, run: VaeRun) -> Iterator[float]:
    """Train encoder and decoder in place; yields each step's loss."""
    generator = torch.Generator().manual_seed(run.seed)
    optimizer = torch.optim.AdamW(
        net.parameters(), lr=run.rate, betas=(0.9, 0.99), weight_decay=0.01
    )
    schedule = warm_cosine(optimizer, run.steps)
    for _ in range(run.steps):
        x, weight = examples(run.batch, generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=run.half):
            mean, logvar = moments(net, x)
            mean, logvar = mean.float(), logvar.float().clamp(-20, 10)
            z = mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape, generator=generator)
            y = decoded(net, z).float()
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()
        yield descend(distance(y, x, weight, critic, run.critic) + run.kl * kl, optimizer, schedule)


def fit_decoder(net: AutoencoderKL, critic: Judge, run: VaeRun) -> Iterator[float]:
    """Train the decoder alone on slightly noisy posterior means; yields each step's loss."""
    generator = torch.Generator().manual_seed(run.seed)
    spread = latent_moments(net, run.seed)[1]
    parts = [*net.decoder.parameters(), *net.post_quant_conv.parameters()]
    optimizer = torch.optim.AdamW(parts, lr=run.rate, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = warm_cosine(optimizer, run.steps)
    for _ in range(run.steps):
        x, weight = examples(run.batch, generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=run.half):
            with torch.no_grad():
                mean = moments(net, x)[0].float()
            z = mean + run.noise * spread * torch.randn(mean.shape, generator=generator)
            y = decoded(net, z).float()
        yield descend(distance(y, x, weight, critic, run.critic), optimizer, schedule)


@torch.no_grad()
def latent_moments(net: AutoencoderKL, seed: int, count: int = 512) -> tuple[Tensor, Tensor]:
    """Return each latent channel's mean and deviation over drawn pictures, (4, 1, 1) each."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.cat([moments(net, examples(64, generator)[0])[0] for _ in range(count // 64)])
    return z.mean((0, 2, 3))[:, None, None], z.std((0, 2, 3))[:, None, None]


def whitening(z: Tensor, floor: float = 0.02) -> tuple[Tensor, Tensor]:
    """Return the mean m (4) and matrix M (4, 4) that whiten latents (B, 4, H, W): M (z - m).

    M = D (R + floor I)^(-1/2) S^(-1) with the deviations S, the correlations R, and D scaling every
    channel to deviation 1: directions below the floor are noise and are not blown up.
    """
    flat = z.double().movedim(1, 0).flatten(1)
    mean, deviation = flat.mean(1), flat.std(1)
    values, vectors = torch.linalg.eigh(torch.corrcoef(flat))
    root = vectors @ torch.diag((values + floor).rsqrt()) @ vectors.T / deviation
    scaled = root / (root @ flat).std(1)[:, None]
    return mean.float(), scaled.float()


def whiten(z: Tensor, mean: Tensor, matrix: Tensor) -> Tensor:
    """Return M (z - m), (B, 4, H, W)."""
    return torch.einsum("ij,bjhw->bihw", matrix, z - mean[:, None, None])


def colour_again(white: Tensor, mean: Tensor, matrix: Tensor) -> Tensor:
    """Return the latents whose whitened form this is, (B, 4, H, W)."""
    return torch.einsum("ij,bjhw->bihw", matrix.inverse(), white) + mean[:, None, None]


@torch.no_grad()
def fold(net: AutoencoderKL, mean: Tensor, matrix: Tensor, scale: float) -> None:
    """Fold whitening and scaling factor into quant_conv and post_quant_conv, in place.

    The log variances are shifted by the channel's own scale only: noise drawn in whitened channels
    then stays as small as the posterior's was.
    """
    into, out = net.quant_conv, net.post_quant_conv
    forth, back = matrix / scale, scale * matrix.inverse()
    out.bias += out.weight[:, :, 0, 0] @ mean
    out.weight.copy_(torch.einsum("oj,ji->oi", out.weight[:, :, 0, 0], back)[:, :, None, None])
    into.bias[4:] -= 2 * (back.norm(dim=1)).log()
    into.bias[:4] = forth @ (into.bias[:4] - mean)
    into.weight[:4] = torch.einsum("ij,jkhw->ikhw", forth, into.weight[:4])


@torch.no_grad()
def encode(net: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Return posterior means, (B, 4, 8, 8), unscaled."""
    return torch.cat([moments(net, part)[0] for part in pictures.split(32)])


@torch.no_grad()
def decode(net: AutoencoderKL, z: Tensor) -> Tensor:
    """Return pictures (B, 3, 64, 64) of unscaled latents."""
    return torch.cat([decoded(net, part) for part in z.split(32)]).clamp(-1, 1)


def ceiling(
    net: AutoencoderKL,
    batch: Sequence[Scene],
    seed: int,
    watermark: bool = False,
    reader: Judge | None = None,
) -> tuple[dict[str, float], Tensor]:
    """Return what the judge reads off drawn pictures after the VAE, and those pictures."""
    pictures = render(batch, torch.Generator().manual_seed(seed), watermark)
    shown = decode(net, encode(net, pictures))
    figures = agreement(shown, batch, reader)
    figures["psnr"] = 10 * math.log10(4 / F.mse_loss(shown, pictures).item())
    return figures, shown
