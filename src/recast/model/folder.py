"""The configuration folder that diffusers wants beside a single file.

    pipe = StableDiffusionXLPipeline.from_single_file("model.safetensors", config="diffusers")

diffusers guesses the architecture of a single file by its widths and fetches the configuration from
a hub. Neither works for checkpoints of other sizes or without a network; with this folder, a
megabyte without weights, both do.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from recast.commit import commit
from recast.errors import Refused
from recast.layout import Layout
from recast.text.tokens import LENGTH, merges, vocabulary

FOLDER = "diffusers"
PIPELINES = {"sdxl": "StableDiffusionXLPipeline", "sd15": "StableDiffusionPipeline"}
PADS = ("<|endoftext|>", "!")  # SDXL's second tokenizer pads with token 0


def write_config_folder(layout: Layout, path: Path) -> None:
    """Write model_index.json and the configuration of every part below `path`.

    Raises Refused for a checkpoint without VAE or text encoders: a pipeline has all of them.
    """
    if layout.vae is None or not layout.texts:
        raise Refused("a diffusers pipeline needs a VAE and text encoders, and the file lacks one.")
    files: dict[str, Any] = {
        "model_index.json": index(layout),
        "unet/config.json": {"_class_name": "UNet2DConditionModel", **layout.unet},
        "vae/config.json": {"_class_name": "AutoencoderKL", **layout.vae},
        "scheduler/scheduler_config.json": scheduler(),
    }
    pairs = merges()
    words = vocabulary(pairs)
    lines = "\n".join(["#version: 0.2", *(f"{a} {b}" for a, b in pairs), ""])
    for number, config in enumerate(layout.texts):
        tail = "" if number == 0 else f"_{number + 1}"
        architecture = "CLIPTextModelWithProjection" if number else "CLIPTextModel"
        text = {"architectures": [architecture], "model_type": "clip_text_model", **config}
        files[f"text_encoder{tail}/config.json"] = text
        files[f"tokenizer{tail}/vocab.json"] = words
        files[f"tokenizer{tail}/merges.txt"] = lines
        files[f"tokenizer{tail}/tokenizer_config.json"] = tokenizer(PADS[number])
    for name, content in files.items():
        write_text(path / name, content)


def index(layout: Layout) -> dict[str, Any]:
    """Which class reads which subfolder."""
    found: dict[str, Any] = {
        "_class_name": PIPELINES[layout.family],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    if len(layout.texts) > 1:
        found["text_encoder_2"] = ["transformers", "CLIPTextModelWithProjection"]
        found["tokenizer_2"] = ["transformers", "CLIPTokenizer"]
        return {**found, "force_zeros_for_empty_prompt": False}
    return {
        **found,
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
    }


def scheduler() -> dict[str, Any]:
    """Stable Diffusion's noise schedule; the caller says what the file predicts."""
    return {
        "_class_name": "EulerDiscreteScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "steps_offset": 1,
        "timestep_spacing": "leading",
    }


def tokenizer(pad: str) -> dict[str, Any]:
    """CLIP's tokenizer, padding with `pad`."""
    end = "<|endoftext|>"
    return {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": LENGTH,
        "bos_token": "<|startoftext|>",
        "eos_token": end,
        "unk_token": end,
        "pad_token": pad,
        "do_lower_case": True,
    }


def write_text(path: Path, content: Any) -> None:
    """Write text as it is and everything else as JSON."""
    text = content if isinstance(content, str) else json.dumps(content, indent=2)
    data = text.encode()
    commit(path, lambda file: file.write(data), size=len(data), force=True)
