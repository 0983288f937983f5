"""The places of a checkpoint that can be trained, by profile, with their names in LoRA files.

    lycoris-full  the matrices and convolutions of LyCORIS' preset "full": SDXL 788, SD 1.5 282
    kohya-conv    those of kohya's networks.lora with conv_dim: SDXL the same 788, SD 1.5 278
    kohya         those of networks.lora without conv_dim, the transformers': SDXL 722, SD 1.5 192
    principal     the same as lycoris-full
    all           also SDXL's time, label, in and out matrices: 794
    readout       every parameter of the last up block and of the output layers
    time          every parameter of the time embedding
    te1, te2, te  the linear layers of a text encoder, or of all there are: 72, 192
    unet          every parameter of the UNet
    every         every parameter of the UNet and the text encoders
    IN04, MID1, OUT08, TE1.L00 …   every parameter of that block
    OUT*, TE2.L1*, *attn2*, *.to_q.weight …   whose block, or whose part.path, a pattern fits

Profiles and blocks may be joined by commas.  Blocks are counted as in the file: IN01 to OUT11 are
input_blocks.1 to output_blocks.11; IN, OUT, TIME, LABEL the layers around them; TE1.EMB, TE1.L00 …,
TE1.NORM, TE2.PROJ those of a text encoder.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from recast.errors import Refused
from recast.layout.blueprint import Plan, blueprint
from recast.layout.keymap import Entry, trace
from recast.layout.names import TEXTS, UNET

KINDS = {1: "norm", 2: "linear", 4: "conv"}
OUTER = ("IN", "OUT", "TIME", "LABEL")  # no part of a transformer, ResNet, down- or upsampler
MATRICES = ("linear", "conv")
TEXT_LAYER = re.compile(r"\.(?:encoder\.layers|resblocks)\.(\d+)\.")
# of CLIP's and of OpenCLIP's names
TEXT_BLOCKS = {"embedding": "EMB", "final_layer_norm": "NORM", "ln_final": "NORM",
               "text_projection": "PROJ"}  # fmt: skip


@dataclass(frozen=True)
class Site:
    """One trainable parameter.

    key: the tensor in the file; module, param: the parameter in its part ("unet", "te1", "te2"), as
    `module.param`. shape is the parameter's. rows: its slice of the file's tensor, None for all of
    it; transpose: whether the file stores it transposed. kind: linear, conv, norm or embedding, of
    the module. lora: kohya's name of the module.
    """

    key: str
    part: str
    module: str
    param: str
    lora: str
    block: str
    kind: str
    shape: tuple[int, ...]
    rows: tuple[int, int] | None = None
    transpose: bool = False

    @property
    def name(self) -> str:
        """The parameter's path in its part."""
        return f"{self.module}.{self.param}"


def sites(plan: Plan, profile: str) -> list[Site]:
    """The sites a profile names, each once, in the order of the network.

    Raises Refused for a name that is no profile and no block of this plan, giving the nearest.
    """
    everything = every(plan)
    wanted: set[str] = set()
    for name in profile.split(","):
        choose = _chooser(plan, everything, name.strip())
        wanted |= {site.part + site.name for site in everything if choose(site)}
    return [site for site in everything if site.part + site.name in wanted]


def every(plan: Plan) -> list[Site]:
    """Every parameter of the UNet and the text encoders."""
    shapes = blueprint(plan)
    entries = [entry for entry in trace(plan) if entry.part != "vae"]
    ranks = {
        (e.part, e.param.rpartition(".")[0]): len(shapes[e.key])
        for e in entries
        if e.param.endswith(".weight")
    }
    return [_site(plan, entry, shapes[entry.key], ranks) for entry in entries]


def _site(
    plan: Plan, entry: Entry, shape: tuple[int, ...], ranks: dict[tuple[str, str], int]
) -> Site:
    module, _, param = entry.param.rpartition(".")
    kind = KINDS[ranks[entry.part, module]]
    if module.endswith("_embedding") and entry.part != "unet":
        kind = "embedding"
    if entry.rows is not None:
        shape = (entry.rows[1] - entry.rows[0], *shape[1:])
    if entry.transpose:
        shape = shape[::-1]
    return Site(
        entry.key, entry.part, module, param, lora_name(plan, entry),
        block_name(entry.part, entry.key), kind, shape, entry.rows, entry.transpose,
    )  # fmt: skip


def lora_name(plan: Plan, entry: Entry) -> str:
    """kohya's name of a module: of the file's path in SDXL, of diffusers' in SD 1.5's UNet."""
    module = entry.param.rpartition(".")[0]
    if entry.part == "unet":
        if plan.family == "sdxl":
            module = entry.key.removeprefix(UNET).rpartition(".")[0]
        return "lora_unet_" + module.replace(".", "_")
    head = "lora_te_" if plan.family == "sd15" else f"lora_{entry.part}_"
    if entry.part == "te1":
        module = "text_model." + module  # a level that newer transformers have dropped
    return head + module.replace(".", "_")


def block_name(part: str, key: str) -> str:
    """The block of a tensor of the file, such as IN04, OUT08, TE2.L31; no tracing is needed."""
    if part != "unet":
        return f"{part.upper()}.{_text_block(key)}"
    first, *rest = key.removeprefix(UNET).split(".")
    if first == "input_blocks":
        return "IN" if rest[0] == "0" else f"IN{int(rest[0]):02}"
    if first == "output_blocks":
        return f"OUT{int(rest[0]):02}"
    names = {"time_embed": "TIME", "label_emb": "LABEL", "out": "OUT"}
    return f"MID{rest[0]}" if first == "middle_block" else names[first]


def _text_block(key: str) -> str:
    if layer := TEXT_LAYER.search(key):
        return f"L{int(layer[1]):02}"
    return next(block for word, block in TEXT_BLOCKS.items() if word in key)


def blocks(plan: Plan) -> dict[str, tuple[str, str]]:
    """Part and block of every tensor of the UNet and the text encoders, by its name in the file."""
    prefixes = {"unet": UNET, **TEXTS[plan.family]}
    return {
        key: (part, block_name(part, key))
        for key in blueprint(plan)
        for part, prefix in prefixes.items()
        if key.startswith(prefix)
    }


def _chooser(plan: Plan, everything: list[Site], name: str) -> Callable[[Site], bool]:
    """What belongs to one profile or block."""

    def matrix(site: Site) -> bool:
        return site.part == "unet" and site.param == "weight" and site.kind in MATRICES

    def inner(site: Site) -> bool:
        return matrix(site) and site.block not in OUTER

    # LyCORIS' preset names diffusers' outer layers, which SDXL's UNet in kohya's trainers has not
    full = inner if plan.family == "sdxl" else matrix

    def layer(part: str) -> Callable[[Site], bool]:
        return lambda site: (
            site.part == part
            and site.param == "weight"
            and site.kind == "linear"
            and ".L" in site.block
        )

    last, texts = _last_up_block(plan), TEXTS[plan.family]
    profiles: dict[str, Callable[[Site], bool]] = {
        "lycoris-full": full,
        "kohya-conv": inner,
        "kohya": lambda site: matrix(site) and ".attentions." in site.module,
        "principal": full,
        "all": matrix,
        "readout": lambda site: site.block in last,
        "time": lambda site: site.block == "TIME",
        "unet": lambda site: site.part == "unet",
        "every": lambda site: True,
        **{part: layer(part) for part in texts},
        "te": lambda site: any(layer(part)(site) for part in texts),
    }
    if name in profiles:
        return profiles[name]
    blocks = {site.block for site in everything}
    block = "IN" if name == "IN00" else name
    if block in blocks:
        return lambda site: site.block == block
    if "*" in name and any(_fits(name, site) for site in everything):
        return lambda site: _fits(name, site)
    names = [*profiles, *sorted(blocks)]
    near = difflib.get_close_matches(name, names, 1, 0)
    raise Refused(
        f"{name!r} is no profile and no block of this model: did you mean {near[0]}? The "
        f"profiles are {', '.join(profiles)}."
    )


def _fits(pattern: str, site: Site) -> bool:
    """Whether a pattern fits the block of a parameter, or its path in its part."""
    return fnmatchcase(site.block, pattern) or fnmatchcase(f"{site.part}.{site.name}", pattern)


def _last_up_block(plan: Plan) -> set[str]:
    """The blocks of the read-out: the last level's output blocks, and the output layers."""
    count = len(plan.unet.widths) * (plan.unet.layers + 1)
    return {"OUT", *(f"OUT{i:02}" for i in range(count - plan.unet.layers - 1, count))}
