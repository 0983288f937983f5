"""Names in single-file checkpoints: where the parts lie, and what may lie beside them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

UNET = "model.diffusion_model."
VAE = "first_stage_model."
# part: prefix of its tensors, per family
TEXTS: dict[str, dict[str, str]] = {
    "sdxl": {
        "te1": "conditioner.embedders.0.transformer.text_model.",
        "te2": "conditioner.embedders.1.model.",
    },
    "sd15": {"te1": "cond_stage_model.transformer.text_model."},
}
# what belongs to the layout: an unexplained name below these is refused, one elsewhere is carried
ROOTS = (UNET, VAE, "conditioner.", "cond_stage_model.")
PART_NAMES = {"unet": "UNet", "vae": "VAE", "te1": "text encoder", "te2": "second text encoder"}

# part: how its modules' names begin in kohya's files (SD 1.5 has no number)
LORA_HEADS = {"unet": ("lora_unet_",), "te1": ("lora_te1_", "lora_te_"), "te2": ("lora_te2_",)}

SPLIT = "recast.split"  # of a residual's header: its split parts and how many layers of each

# tensors that trainers and loaders leave in files and that no network reads
EXTRAS = tuple(
    re.compile(pattern)
    for pattern in (
        r"(conditioner\.embedders\.\d|cond_stage_model)\..*\bposition_ids",
        r"(conditioner\.embedders\.\d|cond_stage_model)\.((model|transformer)\.)?logit_scale",
        r"(conditioner\.embedders\.0|cond_stage_model)\.(transformer\.)?text_projection(\.weight)?",
        r"conditioner\.embedders\.\d\.attn_mask|conditioner\.embedders\.1\.model\.attn_mask",
        r"first_stage_model\.(loss|model_ema)\..*",
        r"model\.diffusion_model\.(sigmas|log_sigmas)",
    )
)
ADAPTER = re.compile(
    r".*(\.lora_(up|down|mid|A|B)(\.\w+)?\.weight|_lora\.(up|down)\.weight|\.(hada|lokr)_w\w+"
    r"|\.diff(_b)?|\.[wb]_norm|\.oft_\w+|\.dora_scale|\.lora(_linear_layer)?\.(up|down)\.weight"
    r"|\.lora_magnitude_vector.*)"
)


def is_extra(key: str) -> bool:
    """Whether a tensor outside the blueprint is known and may be carried through untouched."""
    return not key.startswith(ROOTS) or any(pattern.fullmatch(key) for pattern in EXTRAS)


def is_adapter(key: str) -> bool:
    """Whether a tensor belongs to a LoRA or another adapter."""
    return ADAPTER.fullmatch(key) is not None


def part_of(lora: str) -> str:
    """The part that a kohya module name belongs to, "" for a name without a known beginning."""
    return next((part for part, heads in LORA_HEADS.items() if lora.startswith(heads)), "")


def split_parts(metadata: Mapping[str, str]) -> dict[str, int]:
    """The split parts of a residual and how many layers of each; empty where it does not say."""
    fields = (field.partition("=") for field in metadata.get(SPLIT, "").split(","))
    return {part: int(count) for part, _, count in fields if count.isdecimal()}


def named(parts: Iterable[str]) -> str:
    """Parts in words, as `UNet, text encoder and second text encoder`."""
    words = [PART_NAMES[part] for part in parts if part in PART_NAMES]
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))
