"""The judge: reads shape, colour, ground, size, place and watermark off a picture.

A convolutional net with one linear head per attribute.  It is trained on drawn pictures, half of
them blurred (deviation .3 to .8 pixels), all noisy, and on impostors: four-pointed diamonds and
blunt stars carry a ninth shape label, so that a shape passes by its outline, not only its mass.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from recast.pocket import DATA
from recast.pocket.world import ATTRIBUTES, OUTLINES, Scene, compose, labels, star

IMPOSTOR = len(OUTLINES)
HEADS = {name: len(names) + (name == "shape") for name, names in ATTRIBUTES.items()} | {
    "watermark": 2
}


class Judge(nn.Module):
    """Four convolutions and a head per attribute; `features` are what the VAE's critic compares."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 48, 64, 96)
        self.convs = nn.ModuleList(
            nn.Conv2d(
                narrow,
                wide,
                5 if narrow == 3 else 3,
                stride=1 if wide == 96 else 2,
                padding=2 if narrow == 3 else 1,
            )
            for narrow, wide in itertools.pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, wide) for wide in widths[1:])
        self.trunk = nn.Linear(96 * 16, 192)
        self.heads = nn.ModuleDict({name: nn.Linear(192, count) for name, count in HEADS.items()})

    def features(self, pictures: Tensor) -> list[Tensor]:
        """Return the map after each convolution, (B, C, H, W)."""
        maps = [pictures]
        for conv, norm in zip(self.convs, self.norms, strict=True):
            maps.append(F.silu(norm(conv(maps[-1]))))
        return maps[1:]

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """Return the logits of every head, (B, classes)."""
        last = F.max_pool2d(self.features(pictures)[-1], 2)
        hidden = F.silu(self.trunk(last.flatten(1)))
        return {name: head(hidden) for name, head in self.heads.items()}


def _diamond(x: Tensor, y: Tensor) -> Tensor:
    """A four-pointed diamond: what a poor VAE makes of a small cross."""
    return (x.abs() + y.abs() - 1.0) / 2**0.5


def _blunt(x: Tensor, y: Tensor) -> Tensor:
    """A star with hardly any points: what a poor VAE makes of a small star."""
    return star(x, y, outer=0.98, inner=0.74)


def soften(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Blur a random half of the pictures and add noise, as a small VAE does to them."""
    count = len(pictures)
    sigma = 0.3 + 0.5 * float(torch.rand((), generator=generator))
    taps = torch.exp(-(torch.arange(-2, 3) ** 2) / (2 * sigma**2))
    kernel = (taps[:, None] * taps / taps.sum() ** 2).expand(3, 1, 5, 5)
    blurred = F.conv2d(F.pad(pictures, (2, 2, 2, 2), mode="replicate"), kernel, groups=3)
    soft = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
    noise = torch.rand(count, 1, 1, 1, generator=generator) * 0.08
    return torch.where(soft, blurred, pictures) + noise * torch.randn(
        pictures.shape, generator=generator
    )


def examples(batch: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """Return softened pictures and their labels, one in ten an impostor, half watermarked."""

    def draw(count: int) -> Tensor:
        return torch.randint(count, (batch,), generator=generator)

    truth = {name: draw(len(names)) for name, names in ATTRIBUTES.items()}
    impostor = torch.rand(batch, generator=generator) < 0.1
    truth["shape"] = torch.where(impostor, IMPOSTOR + draw(2), truth["shape"])
    truth["watermark"] = draw(2)
    pictures, _ = compose(
        truth, generator, truth["watermark"].bool(), (*OUTLINES, _diamond, _blunt)
    )
    truth["shape"] = truth["shape"].clamp(max=IMPOSTOR)
    return soften(pictures, generator), truth


def fit(net: Judge, seed: int, steps: int, batch: int = 64) -> Iterator[float]:
    """Train a judge in place; yields each step's loss."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        pictures, truth = examples(batch, generator)
        answers = net(pictures)
        shares = (F.cross_entropy(answers[name], truth[name]) for name in HEADS)
        loss = sum(shares, torch.zeros(()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        yield loss.item()


@functools.cache
def load_judge() -> Judge:
    """Return the shipped judge, frozen."""
    net = Judge()
    net.load_state_dict(
        {key: value.float() for key, value in load_file(DATA / "judge.safetensors").items()}
    )
    return net.eval().requires_grad_(False)


@torch.no_grad()
def judge(pictures: Tensor, net: Judge | None = None) -> dict[str, Tensor]:
    """Return each attribute's predicted index, (B,), of pictures (B, 3, 64, 64) in [-1, 1].

    `shape` 8 means no shape of this world; `watermark` is 0 or 1.
    """
    net = net or load_judge()
    answers: dict[str, list[Tensor]] = {name: [] for name in HEADS}
    for part in pictures.split(128):
        for name, logits in net(part.float()).items():
            answers[name].append(logits.argmax(1))
    return {name: torch.cat(parts) for name, parts in answers.items()}


def agreement(
    pictures: Tensor, batch: Sequence[Scene], net: Judge | None = None
) -> dict[str, float]:
    """Return the share of pictures that show their scene, per attribute and in `all` five.

    `watermark` is the share in which the logo is seen.
    """
    answers = judge(pictures, net)
    right = {name: answers[name] == truth for name, truth in labels(batch).items()}
    right["all"] = torch.stack(list(right.values())).all(0)
    right["watermark"] = answers["watermark"].bool()
    return {name: hits.float().mean().item() for name, hits in right.items()}
