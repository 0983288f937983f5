"""An adapter's keys sorted by modules: parts, shapes, ranks and alphas, without its weights."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from recast.checkpoint import Checkpoint
from recast.errors import Refused
from recast.layout.loras import CLIPS, COMFY_UNET, PEFT, foreign, format_of, parse
from recast.layout.names import part_of
from recast.layout.peft import Configs, alpha_of, configs_of

NUMBERS = {"F16": "<e", "F32": "<f", "F64": "<d", "I64": "<q", "I32": "<i"}
# in a name with `_` for `.`: what only one of the two architectures has
ONLY_SDXL = re.compile(
    r"^lora_te2_|^text_encoder_2_|^text_encoders_clip_g|label_emb|add_embedding"
    r"|^lora_unet_(input|output)_blocks_|transformer_blocks_[1-9]"
)
ONLY_SD15 = re.compile(
    r"^lora_te_|(down|up)_blocks_3_|input_blocks_(9|1\d)_|output_blocks_(9|1\d)_"
)
CONTEXT = {2048: "sdxl", 768: "sd15"}  # width of the text that a UNet of full size attends to


@dataclass(frozen=True)
class Module:
    """One module of a file, by the name the file gives it.

    part: unet, te1 or te2, "" if unknown. shapes: of its tensors by their meaning, as `parse` has
    it. alpha: None where the file gives none; configured: it comes from a configuration. foreign:
    other parametrizations it has tensors of. old: spelt with `.processor.`.
    """

    name: str
    part: str
    shapes: Mapping[str, tuple[int, ...]]
    alpha: float | None
    configured: bool
    foreign: tuple[str, ...]
    old: bool

    @property
    def rank(self) -> int | None:
        """Of the low-rank change; None for another one, or half of one."""
        down = self.shapes.get("lora_down.weight")
        return down[0] if down and "lora_up.weight" in self.shapes else None


@dataclass(frozen=True)
class Seen:
    """An adapter: its format, modules and metadata; odd: keys that no module accounts for."""

    form: str
    modules: tuple[Module, ...]
    metadata: Mapping[str, str]
    odd: tuple[str, ...]
    problems: tuple[str, ...]


def look(files: Sequence[tuple[Checkpoint, str]]) -> Seen:
    """Sort the files of an adapter, each with the part it is for ("" if its names must say)."""
    pieces = [_look(file, part) for file, part in files]
    return Seen(
        pieces[0].form,
        tuple(module for piece in pieces for module in piece.modules),
        {key: value for piece in pieces for key, value in piece.metadata.items()},
        tuple(key for piece in pieces for key in piece.odd),
        tuple(problem for piece in pieces for problem in piece.problems),
    )


def _look(file: Checkpoint, part: str) -> Seen:
    keys: dict[str, dict[str, str]] = {}
    others: dict[str, list[str]] = {}
    odd = []
    for key in file.specs:
        if found := parse(key):
            keys.setdefault(found[0], {})[found[1]] = key
        elif stranger := foreign(key):
            keys.setdefault(stranger[0], {})
            others.setdefault(stranger[0], []).append(stranger[1])
        else:
            odd.append(key)
    form = format_of(keys)
    problems = []
    try:
        configs = configs_of(file.path, file.metadata, form)
    except Refused as refusal:
        configs, problems = {}, [str(refusal)]
    part = part or file.metadata.get("recast.part", "")
    modules = []
    for name, mine in keys.items():
        shapes = {meaning: file.specs[key].shape for meaning, key in mine.items()}
        alpha, configured = _alpha(file, name, mine, shapes, configs)
        kinds = tuple(dict.fromkeys(others.get(name, ())))
        old = any(".processor." in key for key in mine.values())
        where = part if form == "peft" and part else _part(form, name, shapes)
        modules.append(Module(name, where, shapes, alpha, configured, kinds, old))
    return Seen(form, tuple(modules), file.metadata, tuple(odd), tuple(problems))


def family(seen: Seen) -> str | None:
    """Of the checkpoint it is for: by metadata, names, or the width of the text it attends to."""
    stated = seen.metadata.get("recast.family") or seen.metadata.get("ss_base_model_version", "")
    if stated.startswith("sdxl"):
        return "sdxl"
    if stated in ("sd15", "sd_v1"):
        return "sd15"
    names = [module.name.removeprefix(PEFT).replace(".", "_") for module in seen.modules]
    for found, pattern in (("sdxl", ONLY_SDXL), ("sd15", ONLY_SD15)):
        if any(pattern.search(name) for name in names):
            return found
    for module in seen.modules:
        down = module.shapes.get("lora_down.weight", ())
        if len(down) > 1 and module.name.endswith(("attn2.to_k", "attn2_to_k")):
            return CONTEXT.get(down[1])
    return None


def _alpha(
    file: Checkpoint,
    name: str,
    keys: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    configs: Configs,
) -> tuple[float | None, bool]:
    if "alpha" in keys:
        spec = file.specs[keys["alpha"]]
        return _number(bytes(file.raw(keys["alpha"])), spec.dtype), False
    if "lora_down.weight" not in shapes:
        return None, False
    found = alpha_of(configs, name, shapes["lora_down.weight"][0])
    return found, found is not None


def _number(raw: bytes, dtype: str) -> float | None:
    """The first number of a tensor; None for a format that alphas are not written in."""
    if dtype == "BF16" and len(raw) >= 2:
        return float(struct.unpack("<f", b"\0\0" + raw[:2])[0])  # the upper half of an fp32
    code = NUMBERS.get(dtype)
    if code is None or len(raw) < struct.calcsize(code):
        return None
    return float(struct.unpack_from(code, raw)[0])


def _part(form: str, name: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The part that a module is in, by its name."""
    if form == "kohya":
        return "unet" if name.startswith("lycoris_") else part_of(name)
    if form == "comfy":
        heads = {COMFY_UNET: "unet", **{head: part for part, head in CLIPS.items()}}
        return next((part for head, part in heads.items() if name.startswith(head)), "")
    if form == "diffusers":
        heads = {"text_encoder_2.": "te2", "text_encoder.": "te1"}
        return next((part for head, part in heads.items() if name.startswith(head)), "unet")
    if ".encoder.layers." not in f".{name}":
        return "unet"
    side = shapes.get("lora_down.weight" if not name.endswith("fc2") else "lora_up.weight", (0, 0))
    return "te2" if 1280 in side else "te1"
