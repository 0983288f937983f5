"""The plan that the configurations of a diffusers folder describe.

A plan says all that Recast builds; whatever a configuration says beyond it must be what Recast
builds anyway (heads, activations, norms, the scale of latents), or the folder is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recast.errors import Refused
from recast.layout.blueprint import Plan, TextPlan, UNetPlan, VAEPlan
from recast.layout.configs import SAMPLE, Config, text_config, unet_config, vae_config
from recast.layout.latents import of_config
from recast.layout.weights import read_json

INDEX = "model_index.json"
PIPELINE = re.compile(r"StableDiffusion(XL)?(Img2Img|Inpaint)?Pipeline")
SUBFOLDERS = {"unet": "unet", "vae": "vae", "te1": "text_encoder", "te2": "text_encoder_2"}
CLASSES = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "te1": "CLIPTextModel",
    "te2": "CLIPTextModelWithProjection",
}
GIVE = "give an SDXL or SD 1.5 folder"
# what Recast's networks are, where a configuration can say otherwise; absent means just that
UNET: Config = {
    "act_fn": "silu", "center_input_sample": False, "class_embed_type": None, "conv_in_kernel": 3,
    "conv_out_kernel": 3, "cross_attention_norm": None, "dual_cross_attention": False,
    "encoder_hid_dim": None, "flip_sin_to_cos": True, "freq_shift": 0,
    "mid_block_scale_factor": 1, "mid_block_type": "UNetMidBlock2DCrossAttn", "norm_eps": 1e-5,
    "norm_num_groups": 32, "only_cross_attention": False, "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False, "resnet_time_scale_shift": "default",
    "time_cond_proj_dim": None, "time_embedding_type": "positional",
}  # fmt: skip
VAE: Config = {
    "act_fn": "silu", "latents_mean": None, "latents_std": None, "mid_block_add_attention": True,
    "norm_num_groups": 32, "use_post_quant_conv": True,
    "use_quant_conv": True,
}  # fmt: skip
# what diffusers and transformers take where a configuration is silent
SILENT: Config = {
    "attention_head_dim": 8, "addition_time_embed_dim": None,
    "hidden_act": "quick_gelu", "num_attention_heads": 8, "layer_norm_eps": 1e-5,
}  # fmt: skip
WIDEST = 1 << 20  # larger numbers are no network's
MOST = {"layers_per_block": 8, "transformer_layers_per_block": 32, "num_hidden_layers": 64}


class Odd(ValueError):
    """A configuration's entry that no network of Recast's has."""


def read_index(folder: Path) -> Config:
    """model_index.json; raises Refused for folders of other things, saying of what."""
    if not (folder / INDEX).is_file():
        raise Refused(f"{folder} has no {INDEX}{_what(folder)}.")
    index = read_json(folder / INDEX)
    name = str(index.get("_class_name"))[:60]
    if not PIPELINE.fullmatch(name):
        raise Refused(f"{folder} is a {name} folder, which Recast does not convert: {GIVE}.")
    return index


def read_plan(folder: Path, index: Mapping[str, Any]) -> tuple[Plan, int]:
    """The plan, and the side in pixels that the UNet's configuration states.

    A part that the index leaves out is None. Raises Refused for parts that are listed and absent,
    and for configurations that describe another network than Recast builds.
    """
    there = {part: _listed(folder, index, part) for part in SUBFOLDERS}
    if not there["unet"]:
        raise Refused(f"{folder} has no UNet in its {INDEX}: {GIVE}.")
    configs = {
        part: read_json(folder / SUBFOLDERS[part] / "config.json") for part, has in there.items()
        if has
    }  # fmt: skip
    part = "unet"
    try:
        unet = _unet(configs["unet"])
        family = "sd15" if unet.vector is None else "sdxl"
        if family == "sd15" and unet.linear:
            raise Odd("describes a Stable Diffusion 2 UNet, which Recast does not convert")
        made: dict[str, Any] = {}
        for part in [name for name in configs if name not in ("unet",)]:
            made[part] = vae_plan(configs[part]) if part == "vae" else _text(configs[part], part)
        te2 = made.get("te2") if family == "sdxl" else None
        plan = Plan(family, unet, made.get("vae"), made.get("te1"), te2)
        for part in configs:
            if part in ("unet", "vae", "te1") or te2:
                _compare(configs[part], _built(plan, part))
        sample = _number(configs["unet"], "sample_size", SAMPLE[family])
    except (Odd, Refused) as error:
        place = folder / SUBFOLDERS[part] / "config.json"
        raise Refused(f"{place} {str(error).rstrip('.')}: {GIVE}.") from error
    factor = 2 ** (len(plan.vae.widths) - 1) if plan.vae else 8
    return plan, sample * factor


def _listed(folder: Path, index: Mapping[str, Any], part: str) -> bool:
    """Whether the index has a part; refuses one of another class."""
    entry = index.get(SUBFOLDERS[part])
    name = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
    if name is None:
        return False
    if name != CLASSES[part] and not (part == "te1" and name == CLASSES["te2"]):
        raise Refused(
            f"{folder} has a {str(name)[:60]} as its {SUBFOLDERS[part]}, where Stable Diffusion "
            f"has a {CLASSES[part]}: {GIVE}."
        )
    if not (folder / SUBFOLDERS[part]).is_dir():
        raise Refused(
            f"{folder} lists {SUBFOLDERS[part]} in its {INDEX}, and that subfolder is absent: "
            "finish the download."
        )
    return True


def _what(folder: Path) -> str:
    """What a folder without an index is, and what to give instead."""

    def has(name: str) -> bool:
        return (folder / name).exists()

    if has("adapter_config.json") or has("pytorch_lora_weights.safetensors"):
        return ", it is a LoRA's folder: give the model it was made for"
    if has("snapshots"):
        return ", it is a download cache: give the folder below its snapshots"
    if has("config.json"):
        return ", it is one component: give the folder above it"
    if has("unet"):
        return ", so the download is not whole: finish it"
    if has("run.json"):
        return ", it is a run's folder: give the model.safetensors in it"
    return ", so it is no diffusers folder: give one, or a .safetensors file"


def _unet(config: Config) -> UNetPlan:
    widths, layers = _numbers(config, "block_out_channels"), _number(config, "layers_per_block", 2)
    kinds = config.get("down_block_types")
    levels = len(widths)
    if not isinstance(kinds, list) or len(kinds) != levels:
        raise Odd(f"has {str(kinds)[:80]} as down_block_types")
    if odd := [kind for kind in kinds if kind not in ("CrossAttnDownBlock2D", "DownBlock2D")]:
        raise Odd(f"has a {str(odd[0])[:60]}, which Stable Diffusion's UNet has not")
    deep = config.get("transformer_layers_per_block", 1)
    depths = (
        _numbers({"transformer_layers_per_block": deep}, "transformer_layers_per_block")
        if isinstance(deep, list)
        else [_number(config, "transformer_layers_per_block", 1)] * levels
    )
    added = config.get("addition_embed_type")
    if added not in (None, "text_time"):
        raise Odd(f"has {str(added)[:60]!r} as addition_embed_type")
    if len(depths) != levels:
        raise Odd(f"has {len(depths)} transformer_layers_per_block for {levels} levels")
    pairs = zip(kinds, depths, strict=True)
    return UNetPlan(
        widths=tuple(widths),
        depths=tuple(depth if kind.startswith("Cross") else 0 for kind, depth in pairs),
        middle=depths[-1],
        context=_number(config, "cross_attention_dim", None),
        vector=_number(config, "projection_class_embeddings_input_dim", None) if added else None,
        linear=config.get("use_linear_projection", False) is True,
        layers=layers,
        channels=_number(config, "in_channels", 4),
        out=_number(config, "out_channels", 4),
    )


def vae_plan(config: Config) -> VAEPlan:
    """The plan of a VAE's configuration; raises Odd for one of another kind."""
    try:
        of_config(config)
    except ValueError as error:
        raise Odd(str(error)) from error
    return VAEPlan(
        widths=tuple(_numbers(config, "block_out_channels")),
        layers=_number(config, "layers_per_block", 1),
        latent=_number(config, "latent_channels", 4),
    )


def _text(config: Config, part: str) -> TextPlan:
    return TextPlan(
        _number(config, "hidden_size", 512),
        _number(config, "num_hidden_layers", 12),
        _number(config, "intermediate_size", 2048),
        _number(config, "vocab_size", 49408),
        _number(config, "max_position_embeddings", 77),
        _number(config, "projection_dim", 512) if part == "te2" else None,
    )


def _built(plan: Plan, part: str) -> Config:
    """What Recast builds, as far as a plan does not say it."""
    if part == "unet":
        keys = ("up_block_types", "attention_head_dim", "addition_time_embed_dim")
        made = unet_config(plan)
        return UNET | {key: made.get(key) for key in keys}
    if part == "vae":
        assert plan.vae is not None
        made = vae_config(plan.vae, plan.family)
        blocks = ("down_block_types", "up_block_types")
        return VAE | {key: made[key] for key in blocks}
    text = plan.te1 if part == "te1" else plan.te2
    assert text is not None
    made = text_config(text, part)
    return {"layer_norm_eps": 1e-5} | {
        key: made[key] for key in ("hidden_act", "num_attention_heads")
    }


def _compare(config: Config, built: Config) -> None:
    levels = len(built.get("up_block_types", ()))
    for key, wanted in built.items():
        found = config.get(key, SILENT.get(key, wanted))
        if key == "attention_head_dim":  # one number stands for every level
            found, wanted = (
                [each] * levels if isinstance(each, int) else each for each in (found, wanted)
            )
        if found != wanted:
            raise Odd(f"has {str(found)[:60]} as {key}, and Recast builds {str(wanted)[:60]}")


def _number(config: Mapping[str, Any], key: str, silent: int | None) -> int:
    found = config.get(key, silent)
    if type(found) is not int or not 0 < found <= MOST.get(key, WIDEST):
        raise Odd(f"has {str(found)[:60]} as {key}")
    return found


def _numbers(config: Mapping[str, Any], key: str) -> list[int]:
    found = config.get(key)
    if not isinstance(found, list) or not 0 < len(found) <= 8:
        raise Odd(f"has {str(found)[:60]} as {key}")
    return [_number({key: each}, key, None) for each in found]
