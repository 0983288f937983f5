"""Judges for real models, from folders that the user has: nothing is ever downloaded.

    CLIP score    100 max(cos(picture, prompt), 0), mean (Hessel et al. 2021)
    FD-DINOv2     |m_a - m_b|² + tr(S_a + S_b - 2 (S_a S_b)^1/2), class tokens (Stein et al. 2023)

With features centred and divided by sqrt(n - 1) as rows of A and B, tr (S_a S_b)^1/2 is the sum
of the singular values of A B^T: n x n instead of d x d. The distance of few pictures is biased
upwards, so it is comparable only among equal numbers of them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recast.errors import Refused

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
DINO_MEAN, DINO_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH = 16  # pictures at once


@dataclass(frozen=True)
class Clip:
    """A CLIP model."""

    net: Any
    size: int
    device: str

    def score(self, pictures: Sequence[Tensor], prompts: Sequence[str]) -> float:
        """Mean CLIP score of pictures (3, H, W) in [-1, 1] and their prompts."""
        from recast.text.chunks import chunks
        from recast.text.tokens import END

        length = self.net.config.text_config.max_position_embeddings
        rows = [chunks(prompt, pad=END, length=length)[0].ids for prompt in prompts]
        top = self.net.config.text_config.vocab_size
        if max(map(max, rows)) >= top:
            raise Refused(
                f"the CLIP model's vocabulary of {top} tokens is smaller than CLIP's 49408: "
                "give another folder as judge."
            )
        found = []
        for first in range(0, len(pictures), BATCH):
            part = slice(first, first + BATCH)
            pixels = prepared(pictures[part], self.size, CLIP_MEAN, CLIP_STD).to(self.device)
            ids = torch.tensor(rows[part], device=self.device)
            out = self.net(input_ids=ids, pixel_values=pixels)
            found.append(F.cosine_similarity(out.image_embeds, out.text_embeds).clamp(min=0))
        return 100 * torch.cat(found).mean().item()


@dataclass(frozen=True)
class Dino:
    """A DINOv2 model."""

    net: Any
    size: int
    device: str

    def features(self, pictures: Sequence[Tensor]) -> Tensor:
        """Class tokens (N, D) of pictures (3, H, W) in [-1, 1], float64 on the CPU."""
        found = []
        for first in range(0, len(pictures), BATCH):
            some = pictures[first : first + BATCH]
            pixels = prepared(some, self.size, DINO_MEAN, DINO_STD).to(self.device)
            found.append(self.net(pixel_values=pixels).last_hidden_state[:, 0].double().cpu())
        return torch.cat(found)

    def distance(self, one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
        """FD-DINOv2 of two sets of at least two pictures."""
        return frechet(self.features(one), self.features(other))


def open_judge(folder: Path, device: str = "cpu") -> Clip | Dino:
    """Open a folder as transformers saves it (config.json and weights); refuses anything else."""
    kind = judge_kind(folder)
    from transformers import CLIPModel, Dinov2Model
    from transformers.utils import logging

    cls = CLIPModel if kind == "clip" else Dinov2Model
    logging.disable_progress_bar()
    try:
        net, told = cls.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise Refused(f"{folder} cannot be opened as a {kind} model: {reason}") from error
    if lacking := [*told["missing_keys"], *told["mismatched_keys"]]:
        raise Refused(
            f"judge {folder} lacks {len(lacking)} of its weights, first {lacking[0]}: get it anew."
        )
    net = net.to(device).float().eval().requires_grad_(False)
    if kind == "clip":
        return Clip(net, net.config.vision_config.image_size, device)
    # what FD-DINOv2 is defined with; a model with smaller pictures takes its own size
    return Dino(net, min(224, net.config.image_size), device)


def judge_kind(folder: Path) -> str:
    """ "clip" or "dinov2", by the folder's config.json; loads nothing."""
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise Refused(
            f"judge {folder} has no readable config.json: give the folder of a CLIP or DINOv2 "
            "model as transformers saves it."
        ) from error
    if kind not in ("clip", "dinov2"):
        raise Refused(f"judge {folder} is a {kind} model: give a CLIP or DINOv2 model.")
    return str(kind)


def prepared(
    pictures: Sequence[Tensor], size: int, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """Squares of `size` pixels (B, 3, size, size), cut from the middle, with mean and std off."""
    made = []
    for picture in pictures:
        x = (picture[None].float().clamp(-1, 1) + 1) / 2
        side = min(x.shape[-2:])
        top, left = ((length - side) // 2 for length in x.shape[-2:])
        x = x[..., top : top + side, left : left + side]
        x = F.interpolate(x, (size, size), mode="bicubic", antialias=True, align_corners=False)
        made.append(x.clamp(0, 1))
    shift, scale = (torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std))
    return (torch.cat(made) - shift) / scale


def frechet(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of two sets of features (N, D); raises ValueError below two rows."""
    if min(len(a), len(b)) < 2:
        raise ValueError("a covariance needs two pictures or more")
    means, rows, traces = [], [], 0.0
    for x in (a.double(), b.double()):
        centred = (x - x.mean(0)) / (len(x) - 1) ** 0.5
        means.append(x.mean(0))
        rows.append(centred)
        traces += centred.square().sum().item()
    cross = torch.linalg.svdvals(rows[0] @ rows[1].T).sum().item()
    return max(0.0, (means[0] - means[1]).square().sum().item() + traces - 2 * cross)
