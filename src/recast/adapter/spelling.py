"""Which module of an architecture a name in an adapter file is (names: `recast.layout.loras`).

kohya's names follow the file in SDXL and diffusers in SD 1.5; both spellings occur in the wild and
are read. Which diffusers path is which file path depends on the topology, so it is looked up in a
plan, never guessed from text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from recast.errors import Refused
from recast.layout import SD15, SDXL, Plan
from recast.layout.loras import CLIPS, COMFY_UNET, NETWORKS, PEFT
from recast.layout.names import UNET
from recast.layout.sites import every


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
            return COMFY_UNET + self.file
        return CLIPS[self.part] + (self.path if "projection" in self.path else _text(self.path))

    def spellings(self) -> list[str]:
        """All names by which loaders know the module, but PEFT's."""
        flat = [self.lora, self.diffusers(), self.comfy()]
        if self.part == "unet":
            flat += [self.path, f"lycoris_{self.path.replace('.', '_')}"]  # SimpleTuner's
            return flat + [f"lora_unet_{p.replace('.', '_')}" for p in (self.path, self.file)]
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
