"""How adapter files of four worlds call a tensor; no torch, so that `recast inspect` stays quick.

kohya      lora_unet_input_blocks_4_1_proj_in            LyCORIS, A1111 and kohya's trainers
diffusers  unet.down_blocks.1.attentions.0.proj_in       text_encoder., text_encoder_2.
peft       base_model.model.down_blocks.1.attentions.0.proj_in      one folder a network
comfy      diffusion_model.input_blocks.4.1.proj_in      text_encoders.clip_l., clip_g.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

FORMATS = ("kohya", "peft", "diffusers", "comfy")
NETWORKS = {"unet": "unet", "te1": "text_encoder", "te2": "text_encoder_2"}
PEFT = "base_model.model."
COMFY_UNET = "diffusion_model."
CLIPS = {"te1": "text_encoders.clip_l.transformer.", "te2": "text_encoders.clip_g.transformer."}
HEADS = {
    "kohya": ("lora_unet_", "lora_te", "lycoris_"),
    "peft": (PEFT,),
    "comfy": (COMFY_UNET, "text_encoders."),
    "diffusers": ("unet.", "text_encoder.", "text_encoder_2."),
}
# what a tensor is called in files: what it is called here
ENDINGS = {
    ".lora_up.weight": "lora_up.weight",
    ".lora_down.weight": "lora_down.weight",
    ".lora_mid.weight": "lora_mid.weight",
    ".lora_B.weight": "lora_up.weight",
    ".lora_A.weight": "lora_down.weight",
    ".lora_B.default.weight": "lora_up.weight",
    ".lora_A.default.weight": "lora_down.weight",
    ".lora.up.weight": "lora_up.weight",
    ".lora.down.weight": "lora_down.weight",
    ".lora_linear_layer.up.weight": "lora_up.weight",
    ".lora_linear_layer.down.weight": "lora_down.weight",
    "_lora.up.weight": "lora_up.weight",
    "_lora.down.weight": "lora_down.weight",
    ".alpha": "alpha",
    ".diff": "diff",
    ".diff_b": "diff_b",
    ".w_norm": "w_norm",
    ".b_norm": "b_norm",
}
# suffixes: the parametrization that has them and that is no change with factors
FOREIGN = {
    r"dora_scale|lora_magnitude_vector": "DoRA",
    r"hada_\w+": "LoHa",
    r"lokr_\w+": "LoKr",
    r"oft_\w+": "OFT",
    r"[ab][12]": "GLoRA",
    r"on_input": "IA3",
    r"set_weight|reshape_weight": "replaced weights",
    r"bias_(indices|values|size)": "sparse biases",
    r"lora_(up|down|A|B)(\.default)?\.bias": "LoRA biases",
}
STRANGER = {
    name: re.compile(rf"(?P<module>.+?)\.(?P<suffix>({pattern})(\.default)?(\.weight)?)")
    for pattern, name in FOREIGN.items()
}


def parse(key: str) -> tuple[str, str] | None:
    """A tensor's module and meaning, such as ("unet.conv_in", "lora_up.weight"); None if neither.

    Old processor names (`attn1.processor.to_out_lora`) become the module's.
    """
    for ending in sorted(ENDINGS, key=len, reverse=True):
        if key.endswith(ending):
            module = key.removesuffix(ending)
            if ending.startswith("_lora"):
                module = module.replace(".processor.", ".")
                module = module + ".0" if module.endswith(".to_out") else module
            return module, ENDINGS[ending]
    return None


def foreign(key: str) -> tuple[str, str] | None:
    """The module of a tensor that belongs to another parametrization, and that one's name."""
    for name, pattern in STRANGER.items():
        if match := pattern.fullmatch(key):
            return match["module"], name
    return None


def format_of(names: Iterable[str]) -> str:
    """Whose names a file uses, by the heads of its keys; bare paths are diffusers' UNet."""
    listed = list(names)
    counts = {form: sum(name.startswith(heads) for name in listed) for form, heads in HEADS.items()}
    counts["kohya"] += sum(
        "." not in name and not name.startswith(HEADS["kohya"]) for name in listed
    )
    best = max(counts, key=lambda form: counts[form])
    return best if counts[best] else "diffusers"
