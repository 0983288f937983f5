"""Files beside a model for tools that read no marker: a configuration for A1111, words for people.

A1111 looks for `NAME.yaml` beside `NAME.safetensors` and takes it in place of its own guess, so a
model of v needs one there (`modules/sd_models_config.py`). It is written as JSON, which is YAML.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from recast.commit import commit, refuse_target
from recast.errors import Refused
from recast.evaluate.loading import how_to_load
from recast.layout import Plan, detect, open_checkpoint
from recast.layout.configs import SCALING
from recast.markers import read_objective

WORDS_TAIL = ".load.txt"


def hints(path: Path, beside: Path, *, shift: float = 1.0) -> dict[Path, str]:
    """The sidecars of a checkpoint by their paths beside another (usually its own) name.

    Raises Refused where the file does not say clearly what it predicts.
    """
    with open_checkpoint(path) as file:
        layout, evidence = detect(file), read_objective(file.specs, file.metadata)
        objective = evidence.objective
        if objective is None or evidence.contradictions:
            odd = "; ".join(evidence.contradictions or evidence.reasons)
            raise Refused(
                f"{path} does not say clearly what it predicts ({odd}): name it with --as."
            )
    ways = how_to_load(layout.family, objective, beside.name, shift=shift)
    text = f"{beside.name} predicts {objective}.\n"
    text += "".join(f"\n{way.program}: {way.text}\n\n{way.code}\n" for way in ways)
    text += f"\nA1111: {_a1111(objective, beside)}\n"
    found = {beside.with_suffix(WORDS_TAIL): text}
    if objective in ("v", "v-zsnr"):
        found[beside.with_suffix(".yaml")] = json.dumps(webui(layout.plan), indent=2) + "\n"
    return found


def write_hints(found: dict[Path, str], *, force: bool = False) -> list[Path]:
    """Write sidecars, each whole or not at all; none if one of them may not be written."""
    for path in found:
        refuse_target(path, force=force)
    for path, text in found.items():
        data = text.encode()
        commit(path, partial(_put, data), size=len(data), force=force)
    return list(found)


def _put(data: bytes, file: BinaryIO) -> None:
    file.write(data)


def _a1111(objective: str, beside: Path) -> str:
    if objective == "eps":
        return "Nothing else is needed."
    if objective in ("v", "v-zsnr"):
        zsnr = (
            " Choose Settings, Sampler parameters, Noise schedule: Zero Terminal SNR."
            if objective == "v-zsnr" else ""
        )  # fmt: skip
        return f"Keep {beside.with_suffix('.yaml').name} in the same folder.{zsnr}"
    return f"It has no sampler for {objective}."


def webui(plan: Plan) -> dict[str, Any]:
    """The configuration of a model that predicts v, as A1111 opens it."""
    return {"model": _sgm(plan) if plan.family == "sdxl" else _ldm(plan)}


def _unet(plan: Plan) -> dict[str, Any]:
    """What both families' networks are told."""
    unet = plan.unet
    return {
        "use_checkpoint": False,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": unet.widths[0],
        "attention_resolutions": [2**i for i, depth in enumerate(unet.depths) if depth],
        "num_res_blocks": unet.layers,
        "channel_mult": [width // unet.widths[0] for width in unet.widths],
        "use_spatial_transformer": True,
        "context_dim": unet.context,
        "legacy": False,
    }


def _vae() -> dict[str, Any]:
    sizes = {
        "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3,
        "ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [],
        "dropout": 0.0,
    }  # fmt: skip
    return {
        "embed_dim": 4,
        "monitor": "val/rec_loss",
        "ddconfig": sizes,
        "lossconfig": {"target": "torch.nn.Identity"},
    }


def _ldm(plan: Plan) -> dict[str, Any]:
    unet = {**_unet(plan), "image_size": 32, "num_heads": 8, "transformer_depth": 1}
    params = {
        "parameterization": "v", "linear_start": 0.00085, "linear_end": 0.012,
        "num_timesteps_cond": 1, "timesteps": 1000, "first_stage_key": "jpg",
        "cond_stage_key": "txt", "image_size": 64, "channels": 4, "cond_stage_trainable": False,
        "conditioning_key": "crossattn", "scale_factor": SCALING[plan.family], "use_ema": False,
        "unet_config": _part("ldm.modules.diffusionmodules.openaimodel.UNetModel", unet),
        "first_stage_config": _part("ldm.models.autoencoder.AutoencoderKL", _vae()),
        "cond_stage_config": {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"},
    }  # fmt: skip
    return _part("ldm.models.diffusion.ddpm.LatentDiffusion", params)


def _sgm(plan: Plan) -> dict[str, Any]:
    head = "sgm.modules.diffusionmodules"
    unet = {
        **_unet(plan), "adm_in_channels": plan.unet.vector, "num_classes": "sequential",
        "num_head_channels": 64, "use_linear_in_transformer": True,
        "transformer_depth": [max(depth, 1) for depth in plan.unet.depths],
        "spatial_transformer_attn_type": "softmax-xformers",
    }  # fmt: skip
    denoiser = {
        "num_idx": 1000,
        "weighting_config": {"target": f"{head}.denoiser_weighting.VWeighting"},
        "scaling_config": {"target": f"{head}.denoiser_scaling.VScaling"},
        "discretization_config": {"target": f"{head}.discretizer.LegacyDDPMDiscretization"},
    }
    vae = _vae()
    vae["ddconfig"]["attn_type"] = "vanilla-xformers"
    return _part("sgm.models.diffusion.DiffusionEngine", {
        "scale_factor": SCALING[plan.family], "disable_first_stage_autocast": True,
        "denoiser_config": _part(f"{head}.denoiser.DiscreteDenoiser", denoiser),
        "network_config": _part(f"{head}.openaimodel.UNetModel", unet),
        "conditioner_config": _part("sgm.modules.GeneralConditioner", {"emb_models": _texts()}),
        "first_stage_config": _part("sgm.models.autoencoder.AutoencoderKLInferenceWrapper", vae),
    })  # fmt: skip


def _texts() -> list[dict[str, Any]]:
    """SDXL's five conditions: two text encoders and three pairs of sizes."""
    head = "sgm.modules.encoders.modules"
    clip = _part(f"{head}.FrozenCLIPEmbedder", {"layer": "hidden", "layer_idx": 11})
    big = _part(f"{head}.FrozenOpenCLIPEmbedder2", {
        "arch": "ViT-bigG-14", "version": "laion2b_s39b_b160k", "freeze": True,
        "layer": "penultimate", "always_return_pooled": True, "legacy": False,
    })  # fmt: skip
    size = _part(f"{head}.ConcatTimestepEmbedderND", {"outdim": 256})
    keys = {
        "txt": (clip, big), "original_size_as_tuple": (size,), "crop_coords_top_left": (size,),
        "target_size_as_tuple": (size,),
    }  # fmt: skip
    return [
        {"is_trainable": False, "input_key": key, **one} for key, ones in keys.items()
        for one in ones
    ]  # fmt: skip


def _part(target: str, params: dict[str, Any]) -> dict[str, Any]:
    return {"target": target, "params": params}
