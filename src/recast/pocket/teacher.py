"""The pocket teachers: eps networks of SDXL's and SD 1.5's topology with their text encoders.

    x_t  = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps      abar: SD's 1,000 scaled-linear steps
    loss = min(5 / snr, 1) min(1 + 1 / snr, 25) mean((net(x_t, t) - eps)^2)
    snr  = abar / (1 - abar)
The first factor is min-SNR.  The second is v's weight, capped: noise hides the place of a shape
only where snr is below .05; there eps is nearly x_t, and without it that word goes unlearnt.
UNet and text encoders, where not frozen, are trained on whitened latents x0.  t is stratified over
the batch, one caption in ten is empty, and every sixth batch has all 77 tokens, as sampling does.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from recast.pocket.vae import warm_cosine
from recast.pocket.words import BANG, VOCABULARY, compact, kept, tokens
from recast.text.tokens import END, LENGTH

STEPS = 1000
ABAR = torch.cumprod(
    1 - torch.linspace(0.00085**0.5, 0.012**0.5, STEPS, dtype=torch.float64) ** 2, 0
).float()
TIME_IDS = (64.0, 64.0, 0.0, 0.0, 64.0, 64.0)
SHORT = 12


@dataclass(frozen=True)
class TeacherRun:
    seed: int
    steps: int
    rate: float = 1.2e-3
    batch: int = 32
    average: float = 0.9985
    long_every: int = 6
    empty: float = 0.1
    weight: str = "min-SNR 5, v capped at 25"


def text_config(width: int, activation: str, whole: bool) -> CLIPTextConfig:
    """Return a three-layer CLIP text encoder's config, heads of 64 like CLIP's own."""
    vocabulary = VOCABULARY if whole else len(kept())
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=3,
        num_attention_heads=max(1, width // 64),
        max_position_embeddings=LENGTH,
        hidden_act=activation,
        projection_dim=width,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )


class PocketXL(nn.Module):
    """SDXL in small: penultimate states of two text encoders, pooled text and sizes beside time."""

    def __init__(self, whole: bool = False) -> None:
        super().__init__()
        self.whole = whole
        self.text = CLIPTextModel(text_config(64, "quick_gelu", whole))
        self.text_2 = CLIPTextModelWithProjection(text_config(48, "gelu", whole))
        self.unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(64, 64, 64),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=2,
            transformer_layers_per_block=1,
            attention_head_dim=1,
            cross_attention_dim=64 + 48,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=32,
            projection_class_embeddings_input_dim=48 + 6 * 32,
        )

    def ids(self, captions: Sequence[str], length: int, pad: int) -> Tensor:
        """Return the rows of this teacher's embedding table, (B, length)."""
        found = tokens(captions, length, pad)
        return found if self.whole else compact(found)

    def forward(self, x: Tensor, t: Tensor, captions: Sequence[str], length: int) -> Tensor:
        """Return the predicted noise, (B, 4, 8, 8)."""
        first = self.text(self.ids(captions, length, END), output_hidden_states=True)
        second = self.text_2(self.ids(captions, length, BANG), output_hidden_states=True)
        context = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
        sizes = torch.tensor(TIME_IDS).expand(len(x), 6)
        added = {"text_embeds": second.text_embeds, "time_ids": sizes}
        return self.unet(x, t, context, added_cond_kwargs=added).sample


class Pocket15(nn.Module):
    """SD 1.5 in small: four levels, eight heads, the last hidden state of one text encoder."""

    def __init__(self, whole: bool = False) -> None:
        super().__init__()
        self.whole = whole
        self.text = CLIPTextModel(text_config(64, "quick_gelu", whole))
        self.unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(64, 64, 64, 64),
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            layers_per_block=2,
            attention_head_dim=8,
            cross_attention_dim=64,
        )

    def ids(self, captions: Sequence[str], length: int, pad: int) -> Tensor:
        """Return the rows of this teacher's embedding table, (B, length)."""
        found = tokens(captions, length, pad)
        return found if self.whole else compact(found)

    def forward(self, x: Tensor, t: Tensor, captions: Sequence[str], length: int) -> Tensor:
        """Return the predicted noise, (B, 4, 8, 8)."""
        context = self.text(self.ids(captions, length, END)).last_hidden_state
        return self.unet(x, t, context).sample


Teacher = PocketXL | Pocket15
TEACHERS: dict[str, type[Teacher]] = {"pocket-xl": PocketXL, "pocket-15": Pocket15}
SCALES = {"pocket-xl": 0.13025, "pocket-15": 0.18215}


def noised(x0: Tensor, t: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return x_t, the noise in it, and the loss weight (B,)."""
    abar = ABAR[t]
    eps = torch.randn(x0.shape, generator=generator)
    x = abar.sqrt()[:, None, None, None] * x0 + (1 - abar).sqrt()[:, None, None, None] * eps
    snr = abar / (1 - abar)
    return x, eps, (5 / snr).clamp(max=1) * (1 + 1 / snr).clamp(max=25)


def fit(
    net: Teacher,
    average: Teacher,
    latents: Tensor,
    captions: Sequence[str],
    run: TeacherRun,
    guide: Teacher | None = None,
) -> Iterator[float]:
    """Train a teacher in place and its running average with it; yields each step's loss.

    With a guide, its prediction is the target instead of the noise that was drawn.
    """
    generator = torch.Generator().manual_seed(run.seed)
    optimizer = torch.optim.AdamW(
        net.parameters(), lr=run.rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    schedule = warm_cosine(optimizer, run.steps)
    weights: list[Tensor] = [p for p in net.parameters() if p.requires_grad]
    averaged: list[Tensor] = [
        p for p, q in zip(average.parameters(), net.parameters(), strict=True) if q.requires_grad
    ]
    for step in range(run.steps):
        rows = torch.randint(len(latents), (run.batch,), generator=generator)
        silent = torch.rand(run.batch, generator=generator) < run.empty
        words = [
            "" if mute else captions[row]
            for row, mute in zip(rows.tolist(), silent.tolist(), strict=True)
        ]
        t = (
            (torch.arange(run.batch) + torch.rand(run.batch, generator=generator))
            / run.batch
            * STEPS
        ).long()
        x, eps, weight = noised(latents[rows], t, generator)
        length = LENGTH if step % run.long_every == 0 else SHORT
        if guide is not None:
            with torch.no_grad():
                eps = guide(x, t, words, length)
        loss = (weight * ((net(x, t, words, length) - eps) ** 2).mean((1, 2, 3))).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        keep = min(run.average, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(averaged, weights, 1 - keep)
        yield loss.item()


def shadow(net: Teacher) -> Teacher:
    """Return a frozen copy to average weights in."""
    return copy.deepcopy(net).eval().requires_grad_(False)


@torch.no_grad()
def ddim(
    net: Teacher,
    captions: Sequence[str],
    seed: int,
    guidance: float = 3.0,
    steps: int = 25,
    length: int = LENGTH,
) -> Tensor:
    """Return sampled latents, (B, 4, 8, 8); noise depends on the seed and the row only."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(captions), 4, 8, 8, generator=generator)
    times = torch.linspace(STEPS - 1, 0, steps + 1).round().long().tolist()
    for index, t in enumerate(times[:-1]):
        both = net(
            torch.cat([x, x]), torch.full((2 * len(x),), t), [*captions, *([""] * len(x))], length
        )
        told, free = both.chunk(2)
        eps = free + guidance * (told - free)
        abar, after = ABAR[t], ABAR[times[index + 1]] if index + 1 < steps else torch.tensor(1.0)
        x0 = (x - (1 - abar).sqrt() * eps) / abar.sqrt()
        x = after.sqrt() * x0 + (1 - after).sqrt() * eps
    return x
