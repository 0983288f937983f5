"""The module configurations of diffusers and transformers that fit a plan."""

from __future__ import annotations

from typing import Any

from recast.errors import Refused
from recast.layout.blueprint import Plan, TextPlan, UNetPlan, VAEPlan

Config = dict[str, Any]

SCALING = {"sdxl": 0.13025, "sd15": 0.18215}
SAMPLE = {"sdxl": 128, "sd15": 64}  # side of the family's latents
HEAD = 64  # width of an attention head in SDXL and in CLIP; narrower models have one head
HEADS_15 = 8  # SD 1.5 has eight heads at every level
GROUPS = 32
SIZES = 6  # numbers of SDXL's size condition, each embedded to `addition_time_embed_dim`


def unet_config(plan: Plan) -> Config:
    """Arguments of UNet2DConditionModel; raises Refused for what it cannot express."""
    unet = plan.unet
    _refuse_odd(unet)
    blocks = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in unet.depths]
    ups = ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(unet.depths)]
    depths = [max(depth, 1) for depth in unet.depths]
    depths[-1] = unet.middle  # the middle block takes its depth from the last level
    config: Config = {
        "sample_size": SAMPLE[plan.family],
        "in_channels": unet.channels,
        "out_channels": unet.out,
        "down_block_types": blocks,
        "up_block_types": ups,
        "block_out_channels": list(unet.widths),
        "layers_per_block": unet.layers,
        "cross_attention_dim": unet.context,
        "transformer_layers_per_block": depths,
        "use_linear_projection": unet.linear,
    }
    if unet.vector is None:
        return {**config, "attention_head_dim": HEADS_15}
    return {
        **config,
        "attention_head_dim": [max(1, width // HEAD) for width in unet.widths],
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": _size_width(plan),
        "projection_class_embeddings_input_dim": unet.vector,
    }


def vae_config(plan: VAEPlan, family: str) -> Config:
    """Arguments of AutoencoderKL."""
    if odd := [width for width in plan.widths if width % GROUPS]:
        raise Refused(
            f"the VAE has layers {odd[0]} wide, and its group norms take multiples of "
            f"{GROUPS}: give a Stable Diffusion checkpoint."
        )
    return {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * len(plan.widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(plan.widths),
        "block_out_channels": list(plan.widths),
        "layers_per_block": plan.layers,
        "latent_channels": plan.latent,
        "norm_num_groups": GROUPS,
        "sample_size": 8 * SAMPLE[family],
        "scaling_factor": SCALING[family],
        "force_upcast": family == "sdxl",
    }


def text_config(plan: TextPlan, part: str) -> Config:
    """Arguments of CLIPTextConfig; the second encoder is OpenCLIP's."""
    config: Config = {
        "vocab_size": plan.vocabulary,
        "hidden_size": plan.width,
        "intermediate_size": plan.hidden,
        "num_hidden_layers": plan.layers,
        "num_attention_heads": max(1, plan.width // HEAD),
        "max_position_embeddings": plan.positions,
        "hidden_act": "quick_gelu" if part == "te1" else "gelu",
        "bos_token_id": plan.vocabulary - 2,
        "eos_token_id": plan.vocabulary - 1,
    }
    return config if plan.projection is None else {**config, "projection_dim": plan.projection}


def _size_width(plan: Plan) -> int:
    """Width of each embedded size number: what the pooled text leaves of the vector."""
    vector = plan.unet.vector or 0
    pooled = plan.te2.projection if plan.te2 else None
    if not pooled:
        return 256
    width, rest = divmod(vector - pooled, SIZES)
    if rest or width < 2 or width % 2:
        raise Refused(
            f"the UNet's label_emb takes {vector} numbers, which is not {pooled} of pooled "
            f"text and {SIZES} embedded sizes: give a file whose text encoder is the "
            "UNet's own."
        )
    return width


def _refuse_odd(unet: UNetPlan) -> None:
    if odd := [width for width in unet.widths if width % GROUPS]:
        raise Refused(
            f"the UNet has levels {odd[0]} wide, and its group norms take multiples of "
            f"{GROUPS}: give a Stable Diffusion checkpoint."
        )
    if unet.depths[-1] not in (0, unet.middle) or not unet.middle:
        raise Refused(
            f"the UNet's middle block has {unet.middle} transformer blocks and its last "
            f"level {unet.depths[-1]}: diffusers has no such UNet."
        )
    if unet.channels != 4:
        raise Refused(
            f"the UNet takes {unet.channels} channels, so it is an inpainting or editing "
            "model: give its text-to-image base."
        )
