"""The names of one module in the adapter files of four worlds.

    kohya      lora_unet_input_blocks_4_1_proj_in            LyCORIS, A1111 and kohya's trainers
    diffusers  unet.down_blocks.1.attentions.0.proj_in       text_encoder., text_encoder_2.
    peft       base_model.model.down_blocks.1.attentions.0.proj_in      one folder a network
    comfy      diffusion_model.input_blocks.4.1.proj_in      text_encoders.clip_l., clip_g.

kohya's names follow the file in SDXL and diffusers in SD 1.5; both spellings occur in the wild and
are read. Which diffusers path is which file path depends on the topology, so it is looked up in a
plan, never guessed from text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

from recast.errors import Refused
from recast.layout import SD15, SDXL, Plan
from recast.layout.names import UNET
from recast.layout.sites import every

FORMATS = ("kohya", "peft", "diffusers", "comfy")
NETWORKS = {"unet": "unet", "te1": "text_encoder", "te2": "text_encoder_2"}
PEFT = "base_model.model."
CLIPS = {"te1": "text_encoders.clip_l.transformer.", "te2": "text_encoders.clip_g.transformer."}
HEADS = {
    "kohya": ("lora_unet_", "lora_te"),
    "peft": (PEFT,),
    "comfy": ("diffusion_model.", "text_encoders."),
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


@dataclass(frozen=True)
class Module:
    """One module: kohya's name, its part, and its paths in the part's network and in the file."""

    lora: str
    part: str
    path: str
    file: str

    def peft(self) -> str:
        """The key's head in a PEFT folder of the part."""
        return PEFT + self.path

    def diffusers(self) -> str:
        """The key's head in a diffusers file; loaders drop `text_model.` where there is none."""
        return f"{NETWORKS[self.part]}.{self.path if self.part == 'unet' else _text(self.path)}"

    def comfy(self) -> str:
        """The key's head in ComfyUI's own names."""
        if self.part == "unet":
            return "diffusion_model." + self.file
        return CLIPS[self.part] + (self.path if "projection" in self.path else _text(self.path))

    def spellings(self) -> list[str]:
        """All names by which loaders know the module, but PEFT's."""
        flat = [self.lora, self.diffusers(), self.comfy()]
        if self.part == "unet":
            paths = (self.path, self.file)
            return flat + [self.path] + [f"lora_unet_{path.replace('.', '_')}" for path in paths]
        flat.append(f"{NETWORKS[self.part]}.{self.path}")
        return [*flat, self.lora.replace("lora_te_", "lora_te1_")]


@cache
def modules(plan: Plan) -> dict[str, Module]:
    """The modules of the UNet and the text encoders of a plan by kohya's names."""
    found: dict[str, Module] = {}
    for site in every(plan):
        file = site.key.removeprefix(UNET).removesuffix(f".{site.param}")
        found.setdefault(site.lora, Module(site.lora, site.part, site.module, file))
    return found


@cache
def shapes(plan: Plan) -> dict[str, tuple[int, ...]]:
    """The weight's shape of every module of a plan, by kohya's names."""
    return {site.lora: site.shape for site in every(plan) if site.param == "weight"}


@cache
def spelt(plan: Plan) -> dict[str, str]:
    """kohya's name for every spelling of every module of a plan."""
    return {name: m.lora for m in modules(plan).values() for name in m.spellings()}


@cache
def paths(plan: Plan, part: str) -> dict[str, str]:
    """kohya's name for a module's path in one network, as PEFT uses it."""
    mine = [module for module in modules(plan).values() if module.part == part]
    bare = {module.path.removeprefix("text_model."): module.lora for module in mine}
    return bare | {_text(path): lora for path, lora in bare.items() if part != "unet"}


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


def format_of(names: Iterable[str]) -> str:
    """Whose names a file uses, by the heads of its keys; bare paths are diffusers' UNet."""
    listed = list(names)
    counts = {form: sum(name.startswith(heads) for name in listed) for form, heads in HEADS.items()}
    counts["kohya"] += sum("." not in name and not name.startswith("lora_") for name in listed)
    best = max(counts, key=lambda form: counts[form])
    return best if counts[best] else "diffusers"


def plan_of(
    spots: Mapping[str, tuple[str, tuple[int, int]]], metadata: Mapping[str, str], where: str
) -> Plan:
    """The full-size plan that a file's modules belong to, where no checkpoint says.

    spots: by module the part it is known to be in ("" if not), and the outer sizes (out, in) of
    its change, zeros where it is no low-rank one.
    """
    family = metadata.get("recast.family") or metadata.get("ss_base_model_version", "")
    if family.startswith("sdxl"):
        return SDXL
    if family in ("sd15", "sd_v1"):
        return SD15
    fits = [plan for plan in (SDXL, SD15) if _fits(plan, spots, sized=False)]
    sized = [plan for plan in fits if _fits(plan, spots, sized=True)]
    best = sized or fits
    if len(best) == 1:
        return best[0]
    raise Refused(
        f"{where} does not say which architecture its {len(spots)} modules belong to, first "
        f"{', '.join(list(spots)[:5])}; name the checkpoint it was made for with --model."
    )


def _fits(plan: Plan, spots: Mapping[str, tuple[str, tuple[int, int]]], *, sized: bool) -> bool:
    for name, (part, size) in spots.items():
        lora = paths(plan, part).get(name) if part else spelt(plan).get(name)
        if lora is None:
            return False
        shape = shapes(plan).get(lora)
        if sized and any(size) and (shape is None or shape[:2] != size):
            return False
    return True


def _text(path: str) -> str:
    """A path in a text encoder with the level that newer transformers dropped from one of two."""
    return path if path.startswith("text_model.") else f"text_model.{path}"
