"""Pocket checkpoints as single files, named tensor by tensor like Stability's and Runway's own.

The names come from recast.layout's key map, in both directions: what is written is read back into
fresh modules of the full vocabulary, and those are what the final gate measures.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from recast.checkpoint import Checkpoint, write_dict
from recast.layout import Plan, TextPlan, UNetPlan, VAEPlan, detect, from_file, keymap, to_file
from recast.layout.keymap import trace
from recast.layout.names import TEXTS
from recast.pocket import vae
from recast.pocket.teacher import SCALES, TEACHERS, Teacher
from recast.pocket.words import VOCABULARY, scatter
from recast.text.tokens import LENGTH

_VAE = VAEPlan((32, 32, 64, 64))
PLANS = {
    "pocket-xl": Plan(
        "sdxl",
        UNetPlan((64, 64, 64), (0, 1, 1), 1, 64 + 48, 48 + 6 * 32, linear=True),
        _VAE,
        TextPlan(64, 3, 256),
        TextPlan(48, 3, 192, projection=48),
    ),
    "pocket-15": Plan(
        "sd15",
        UNetPlan((64, 64, 64, 64), (1, 1, 1, 0), 1, 64, None, linear=False),
        _VAE,
        TextPlan(64, 3, 256),
    ),
}
WORLD = {"recast.size": "64", "recast.world": "pocket"}  # its side in pixels, and who can judge it
EMBEDDING = "token_embedding.weight"
LOGIT_SCALE = 4.6052  # ln 100, where CLIP's training clamps it


def parts(net: Teacher, autoencoder: AutoencoderKL) -> dict[str, nn.Module]:
    """Return a checkpoint's modules by their part's name."""
    found = {"unet": net.unet, "te1": net.text, "vae": autoencoder}
    return found | ({"te2": net.text_2} if hasattr(net, "text_2") else {})


def write_checkpoint(
    path: Path, name: str, net: Teacher, autoencoder: AutoencoderKL, metadata: Mapping[str, str]
) -> str:
    """Write a teacher and its folded VAE in half precision; returns the file's sha256."""
    plan = PLANS[name]
    weights = {
        part: _whole(module.state_dict()) for part, module in parts(net, autoencoder).items()
    }
    tensors = {key: tensor.half().contiguous() for key, tensor in to_file(trace(plan), weights)}
    prefixes = TEXTS[plan.family]
    tensors[prefixes["te1"] + "embeddings.position_ids"] = torch.arange(LENGTH)[None]
    if plan.te2:
        tensors[prefixes["te2"] + "logit_scale"] = torch.tensor(LOGIT_SCALE).half()
    digest = write_dict(path, tensors, {**WORLD, **metadata}, force=True)
    with Checkpoint(path) as written:
        detect(written)
    return digest


def read_checkpoint(path: Path, name: str) -> tuple[Teacher, AutoencoderKL]:
    """Return a written checkpoint's modules in full precision, frozen."""
    net, autoencoder = TEACHERS[name](whole=True), vae.build()
    with Checkpoint(path) as checkpoint:
        entries = keymap(detect(checkpoint))
        for part, module in parts(net, autoencoder).items():
            found = from_file(entries, checkpoint, part)
            module.load_state_dict({param: tensor.float() for param, tensor in found})
    return net.eval().requires_grad_(False), autoencoder.eval().requires_grad_(False)


def folded(autoencoder: AutoencoderKL, world: Mapping[str, Tensor], name: str) -> AutoencoderKL:
    """Return the autoencoder with whitening and the family's scaling factor folded in."""
    vae.fold(autoencoder, world["mean"], world["matrix"], SCALES[name])
    return autoencoder


def _whole(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict whose embedding table, if any, has every row of CLIP's vocabulary."""
    return {
        key: scatter(value) if key.endswith(EMBEDDING) and len(value) < VOCABULARY else value
        for key, value in state.items()
    }
