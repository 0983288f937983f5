"""A model of milliseconds: latents are averaged pixels, conditions a hash of their text."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from recast.text.encode import Condition


@dataclass
class Fake:
    """What `Store` asks of a model; `encoded` and `said` are what was really computed."""

    size: int = 32
    name: str = "a"
    factor: int = 8
    scaling: float = 1.0
    shift: float = 0.0
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    text_parts: tuple[str, ...] = ("te1",)
    encoded: int = 0
    said: list[str] = field(default_factory=list)

    def fingerprint(self, part: str) -> str:
        return f"{self.name} {part}"

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        return 3, size[0] // self.factor, size[1] // self.factor

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        self.encoded += 1
        return torch.nn.functional.avg_pool2d(images, self.factor)

    def condition(self, prompts: Sequence[str]) -> Condition:
        self.said += prompts
        rows = [hashlib.sha256(prompt.encode()).digest() for prompt in prompts]
        numbers = torch.tensor([list(row) for row in rows]).float() + 1
        return Condition(numbers[:, None, :16], numbers[:, 16:])
