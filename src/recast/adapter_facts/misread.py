"""What each program makes of an adapter file that it does not take for what it is.

From the programs' sources and, for diffusers, PEFT and LyCORIS, from loading such files
(`tests/adapter` does); a file that nobody misreads gives no line.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from recast.adapter_facts.seen import Module, Seen
from recast.layout.names import PART_NAMES

Notes = Iterator[tuple[str, str]]
TENSORS = ("kohya", "comfy")  # formats whose alphas are tensors
KOHYA = "kohya's trainer"


def misreadings(seen: Seen) -> Notes:
    """(program, what it does) for whatever is not read as it is meant."""
    for rule in RULES:
        yield from rule(seen)


def role(seen: Seen) -> Notes:
    """Principal adapters are half a model."""
    if seen.metadata.get("recast.role", "").startswith("pissa"):
        yield (
            "all",
            "must be given the residual of the split as model: on the original, these weights would"
            " count twice; recast extract makes an ordinary LoRA",
        )


def names(seen: Seen) -> Notes:
    """Formats that a program does not know."""
    if seen.form == "comfy":
        yield (
            "diffusers, kohya's tools",
            "load nothing, for they do not know ComfyUI's names; recast export --to kohya",
        )
    if seen.form == "peft":
        yield (
            "ComfyUI, A1111, kohya's tools, load_lora_weights",
            "do not read PEFT's files; recast export --to kohya",
        )
    if seen.form == "diffusers":
        lost = [m for m in seen.modules if m.part == "unet" and ".to_" in m.name and not m.old]
        if lost:
            yield (
                "ComfyUI",
                f"does not know {len(lost)} attention layers of the UNet by these names; "
                "recast export --to kohya",
            )


def alphas(seen: Seen) -> Notes:
    """Scales alpha / r that a program would get wrong."""
    low = [module for module in seen.modules if module.rank is not None]
    scaled = [module for module in low if module.alpha not in (None, module.rank)]
    if seen.form == "diffusers":
        mine = [module for module in scaled if not module.configured]
        if mine:
            yield "diffusers", f"passes over alpha tensors: {len(mine)} layers get scale 1"
        mine = [module for module in scaled if module.configured]
        if mine:
            yield "ComfyUI", f"reads no configuration: {len(mine)} layers get scale 1"
    if seen.form not in TENSORS:
        return
    if low and all(module.alpha is None for module in low):
        yield (
            "all",
            "no alpha: ComfyUI, A1111, LyCORIS and diffusers take scale 1, resize tools pass the "
            "layers over; if it was cut out, strength is r / alpha times too much",
        )
    elif seen.form == "kohya":
        for part, modules in by_part(low):
            yield from _alphas_in_diffusers(part, modules)


def _alphas_in_diffusers(part: str, modules: list[Module]) -> Notes:
    """Of one network, in kohya's names."""
    counts = Counter(module.alpha for module in modules if module.alpha is not None)
    if not counts:
        return
    common = counts.most_common(1)[0][0]
    none = [m for m in modules if m.alpha is None and m.rank != common]
    if none:
        yield (
            "diffusers",
            f"gives the {len(none)} layers of the {PART_NAMES[part]} without alpha the commonest "
            f"one, {common:g}; other programs take scale 1",
        )
    if len(counts) > 1:
        other = sum(counts.values()) - counts[common]
        yield (
            "diffusers",
            f"gives attention layers the commonest of {len(counts)} alphas, {common:g}, also where "
            f"they have another ({other} layers of the {PART_NAMES[part]} do); "
            "recast export --to kohya writes one alpha",
        )


def text_attention(seen: Seen) -> Notes:
    """diffusers recognises kohya's attention layers of a text encoder by their out_proj."""
    if seen.form != "kohya":
        return
    for part, modules in by_part(seen.modules):
        held = {module.name.rpartition("_")[0].rpartition("_")[2] for module in modules}
        attention = [module for module in modules if "_self_attn_" in module.name]
        if part == "unet" or not attention or "out" in held:
            continue
        does = f"drops {len(attention)} attention layers of"
        if not any("_mlp_" in module.name for module in modules):
            does = "refuses the file for"
        yield (
            "diffusers",
            f"{does} the {PART_NAMES[part]}, which has no out_proj; recast export --to kohya adds "
            "zeros",
        )


def kinds(seen: Seen) -> Notes:
    """Entries that are no plain pair of factors."""
    tucker = [m for m in seen.modules if "lora_mid.weight" in m.shapes]
    full = [m for m in seen.modules if m.shapes.keys() & {"diff", "diff_b", "w_norm", "b_norm"}]
    if tucker:
        yield "diffusers", f"refuses the file: {len(tucker)} layers have a Tucker core, lora_mid"
        yield KOHYA, "does not load Tucker cores; recast export --to kohya multiplies them out"
    if full:
        yield "diffusers", f"refuses the file: {len(full)} layers have full changes (.diff, w_norm)"
    norms = [m for m in full if len(m.shapes.get("diff", (0, 0))) == 1]
    if norms:
        yield "LyCORIS", f"reads changes of norms as w_norm, b_norm only ({len(norms)} are .diff)"
    if any("w_norm" in m.shapes and "b_norm" not in m.shapes for m in full):
        yield "A1111, Forge", "want a b_norm beside every w_norm"
    both = [m for m in full if m.rank is not None and m.shapes.keys() & {"diff", "w_norm"}]
    if both:
        yield "ComfyUI", f"applies only the full change of {len(both)} layers with factors too"


def foreign(seen: Seen) -> Notes:
    """Other parametrizations."""
    counts = Counter(kind for module in seen.modules for kind in module.foreign)
    for kind, count in counts.items():
        if kind == "DoRA" and seen.form == "kohya":
            yield "diffusers", f"drops dora_scale of {count} layers, so pictures differ"
            yield "kohya's tools", "pass over dora_scale, so pictures differ"
        elif kind != "DoRA":
            yield "diffusers, kohya's networks.lora", f"do not know {kind} ({count} layers)"


def ranks(seen: Seen) -> Notes:
    """kohya's trainer builds one rank before it reads the file."""
    found = {module.rank for module in seen.modules if module.rank is not None}
    if seen.form == "kohya" and len(found) > 1:
        yield (
            KOHYA,
            f"needs --dim_from_weights for ranks {min(found)} to {max(found)}; "
            "or recast export --to kohya --pad",
        )


def by_part(modules: Iterable[Module]) -> Iterator[tuple[str, list[Module]]]:
    """Modules of each known part."""
    listed = list(modules)
    for part in PART_NAMES:
        if mine := [module for module in listed if module.part == part]:
            yield part, mine


RULES: tuple[Callable[[Seen], Notes], ...] = (
    role, names, alphas, text_attention, kinds, foreign, ranks,
)  # fmt: skip
