"""Which block a module of an adapter lies in, by its name alone, and which blocks there are.

    input_blocks.7.…     IN07        down_blocks.2.attentions.0     IN01 + 2 (n + 1) = IN07
    middle_block.1.…     MID1        mid_block.attentions.0         MID1
    output_blocks.1.…    OUT01       up_blocks.0.attentions.1       OUT00 + 0 (n + 1) + 1 = OUT01
    IN, OUT, TIME, LABEL             the layers around them
    TE1.L00 …, TE1.EMB, TE1.NORM     a text encoder's

n is the number of ResNets of a level, 2 in SDXL and in SD 1.5. The names are those of
`recast.layout.sites`, read off the text here, because the full architecture takes seconds to trace.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

from recast.errors import Refused
from recast.layout.blueprint import SD15, SDXL, Plan

SGM = re.compile(r"(input_blocks|middle_block|output_blocks)_(\d+)_")
DIFFUSERS = re.compile(
    r"(down_blocks|up_blocks)_(\d+)_(resnets|attentions|downsamplers|upsamplers)_(\d+)_"
)
MIDDLE = re.compile(r"mid_block_(resnets|attentions)_(\d+)_")
AROUND = {
    "time_embed": "TIME", "label_emb": "LABEL", "add_embedding": "LABEL", "conv_in": "IN",
    "out_": "OUT", "conv_out": "OUT", "conv_norm_out": "OUT",
}  # fmt: skip
TEXT = re.compile(r"lora_te(\d?)_(?:text_model_)?(.*)")
TEXT_PARTS = {"": "te1", "1": "te1", "2": "te2"}


@dataclass(frozen=True)
class Spot:
    """One module of an adapter: kohya's name, its part and its block."""

    lora: str
    part: str
    block: str


def spot(lora: str, layers: int = 2) -> Spot | None:
    """Where a module lies, by kohya's name of it; None for a name that says nothing.

    layers: ResNets of a level, for diffusers' names.
    """
    if lora.startswith("lora_unet_"):
        block = _unet_block(lora.removeprefix("lora_unet_") + "_", layers)
        return Spot(lora, "unet", block) if block else None
    if found := TEXT.fullmatch(lora):
        part = TEXT_PARTS.get(found[1])
        block = _text_block(found[2])
        return Spot(lora, part, f"{part.upper()}.{block}") if part and block else None
    return None


def _unet_block(name: str, layers: int) -> str | None:
    if found := SGM.match(name):
        if found[1] == "middle_block":
            return f"MID{found[2]}"
        head, number = "IN" if found[1] == "input_blocks" else "OUT", int(found[2])
        return "IN" if (head, number) == ("IN", 0) else f"{head}{number:02}"
    if found := DIFFUSERS.match(name):
        level, place = int(found[2]) * (layers + 1), int(found[4])
        if found[1] == "down_blocks":
            return f"IN{level + 1 + (layers if found[3] == 'downsamplers' else place):02}"
        return f"OUT{level + (layers if found[3] == 'upsamplers' else place):02}"
    if found := MIDDLE.match(name):
        return "MID1" if found[1] == "attentions" else f"MID{2 * int(found[2])}"
    return next((block for head, block in AROUND.items() if name.startswith(head)), None)


def _text_block(name: str) -> str | None:
    if found := re.match(r"encoder_layers_(\d+)_", name):
        return f"L{int(found[1]):02}"
    heads = {"embeddings": "EMB", "final_layer_norm": "NORM", "text_projection": "PROJ"}
    return next((block for head, block in heads.items() if name.startswith(head)), None)


def blocks(plan: Plan) -> list[str]:
    """All blocks of an architecture, in the order of the network."""
    count = len(plan.unet.widths) * (plan.unet.layers + 1)
    found = ["TIME", *(["LABEL"] if plan.unet.vector else []), "IN"]
    found += [f"IN{i:02}" for i in range(1, count)] + [f"MID{i}" for i in range(3)]
    found += [f"OUT{i:02}" for i in range(count)] + ["OUT"]
    for part, text in (("TE1", plan.te1), ("TE2", plan.te2)):
        if text:
            found += [f"{part}.EMB", *(f"{part}.L{i:02}" for i in range(text.layers))]
            found += [f"{part}.NORM", *([f"{part}.PROJ"] if text.projection else [])]
    return found


def architecture(names: Iterable[str], metadata: Mapping[str, str], where: str) -> Plan:
    """The full-size architecture that kohya's module names belong to.

    Every name that only one family has is a vote. Raises Refused where the votes disagree.
    """
    votes: dict[str, list[str]] = {"sdxl": [], "sd15": []}
    listed = list(names)
    for name in listed:
        if family := _family(name):
            votes[family].append(name)
    if votes["sdxl"] and votes["sd15"]:
        raise Refused(
            f"{where} mixes architectures: {len(votes['sdxl'])} modules are SDXL's, such as "
            f"{votes['sdxl'][0]}, and {len(votes['sd15'])} are SD 1.5's, such as "
            f"{votes['sd15'][0]}; take it apart, or name its checkpoint with --model."
        )
    stated = metadata.get("recast.family") or metadata.get("ss_base_model_version", "")
    family = "sdxl" if stated.startswith("sdxl") else "sd15" if stated.startswith("sd") else ""
    voted = next((family for family, found in votes.items() if found), "")
    if family and voted and family != voted:
        raise Refused(
            f"{where} says it is for {stated}, but its {votes[voted][0]} is of {voted} alone; "
            "name its checkpoint with --model."
        )
    spelt = "sdxl" if any(SGM.match(n.removeprefix("lora_unet_")) for n in listed) else "sd15"
    return {"sdxl": SDXL, "sd15": SD15}[voted or family or spelt]


def _family(lora: str) -> str | None:
    """The one family that has a module of this name, None where both have, or neither."""
    found = spot(lora)
    fits = [plan.family for plan in (SDXL, SD15) if found and _fits(found, plan)]
    return fits[0] if len(fits) == 1 else None


def _fits(found: Spot, plan: Plan) -> bool:
    known, attended = _sets(plan)
    if (found.lora.startswith("lora_te_") and plan.te2) or found.block not in known:
        return False
    inside = re.search(r"_attentions_|_transformer_blocks_(\d+)_", found.lora)
    if found.part != "unet" or not inside:
        return True
    return found.block in attended and int(inside[1] or 0) < max(plan.unet.depths)


@cache
def _sets(plan: Plan) -> tuple[frozenset[str], frozenset[str]]:
    """All blocks of an architecture, and those with transformers."""
    depths, layers = plan.unet.depths, plan.unet.layers
    attended = {"MID1"}
    for level, depth in enumerate(depths):
        if depth:
            down, up = level * (layers + 1) + 1, (len(depths) - 1 - level) * (layers + 1)
            attended |= {f"IN{down + i:02}" for i in range(layers)}
            attended |= {f"OUT{up + i:02}" for i in range(layers + 1)}
    return frozenset(blocks(plan)), frozenset(attended)
