"""The primer: a text encoder learns to say all five words of a caption before any picture is seen.

Every attribute value has a code c, one of 64 orthonormal vectors; from the end token on, each state
must be 3.5 times the sum of its caption's five codes.  CLIP's encoders too are trained before the
diffusion model, and frozen after.  Trained jointly, pocket-15's forgot the place: that word comes
last, and a UNet has a use for it only once it has learnt where its own pixels are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import CLIPTextModel

from recast.pocket.vae import warm_cosine
from recast.pocket.words import compact, tokens
from recast.pocket.world import ATTRIBUTES, caption, labels, scenes
from recast.text.tokens import END, LENGTH

SIZE = 3.5


@dataclass(frozen=True)
class PrimerRun:
    seed: int
    steps: int
    rate: float = 2e-3
    batch: int = 64
    short: int = 12
    long_every: int = 10


def codes(width: int) -> dict[str, Tensor]:
    """Return every attribute's codes, (values, width)."""
    noise = torch.randn(width, width, generator=torch.Generator().manual_seed(0))
    rows = torch.linalg.qr(noise)[0][: sum(map(len, ATTRIBUTES.values()))]
    return dict(zip(ATTRIBUTES, rows.split([len(v) for v in ATTRIBUTES.values()]), strict=True))


def fit(encoder: CLIPTextModel, run: PrimerRun) -> Iterator[float]:
    """Train a compact text encoder in place; yields each step's loss."""
    generator = torch.Generator().manual_seed(run.seed)
    optimizer = torch.optim.AdamW(
        encoder.parameters(), lr=run.rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    schedule = warm_cosine(optimizer, run.steps, warm=30)
    pool, table = scenes(), codes(encoder.config.hidden_size)
    for step in range(run.steps):
        rows = torch.randint(len(pool), (run.batch,), generator=generator)
        batch = [pool[row] for row in rows.tolist()]
        length = run.short if step % run.long_every else LENGTH
        found = tokens([caption(scene) for scene in batch], length)
        states = encoder(compact(found)).last_hidden_state
        parts = (table[name][truth] for name, truth in labels(batch).items())
        wanted = SIZE * sum(parts, torch.zeros(()))
        loss = ((states - wanted[:, None]) ** 2).mean(-1)[found == END].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        yield loss.item()
