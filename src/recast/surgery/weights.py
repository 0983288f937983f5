"""Weights of an adapter's modules, given by names: one grammar for every verb that cuts by block.

    OUT*=0.5,TE1=0,OUT01.attn2=1       the last name that fits a module counts; 1 where none does

    IN07 MID1 OUT01 TIME TE2.L31       a block; IN, OUT, TIME, LABEL are the layers around them
    OUT* TE2.L2? *                     a glob of blocks; unet, te, te1, te2, MID are all theirs
    attn2 to_q proj_in ff emb_layers   a word of the module's name between two underscores, or dots
    OUT01.attn2                        both
    lora_unet_output_blocks_1_1_*      a glob of whole names

A name means the same in every file: it counts no positions, so cutting blocks out shifts nothing.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from recast.errors import Refused
from recast.layout.blueprint import Plan
from recast.surgery.blocks import Spot, blocks

PARTS = {"UNET": ("unet",), "TE": ("te1", "te2"), "TE1": ("te1",), "TE2": ("te2",)}
# names of blocks, which are never words: OUT is not the `out` of `to_out`
RESERVED = {"IN", "MID", "OUT", "TIME", "LABEL", *PARTS}
# words of module names, in the file's spelling and in diffusers', known without any file
WORDS = (
    "attn1", "attn2", "ff", "ff_net_0_proj", "ff_net_2", "to_q", "to_k", "to_v", "to_out_0",
    "proj_in", "proj_out", "in_layers", "out_layers", "emb_layers", "skip_connection", "op", "conv",
    "transformer_blocks", "resnets", "attentions", "downsamplers", "upsamplers", "conv1", "conv2",
    "conv_shortcut", "time_emb_proj", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj", "mlp",
    "fc1", "fc2",
)  # fmt: skip


@dataclass(frozen=True)
class Weights:
    """Weights by name; of several that fit a module the last counts, and without one it is 1."""

    rules: tuple[tuple[str, float], ...] = ()

    def of(self, spot: Spot) -> float:
        """The weight of one module."""
        return next((w for name, w in reversed(self.rules) if fits(name, spot)), 1.0)

    def __add__(self, other: Weights) -> Weights:
        return Weights(self.rules + other.rules)

    def __str__(self) -> str:
        return ",".join(f"{name}={weight:.10g}" for name, weight in self.rules)


def parse(text: str) -> Weights:
    """Weights from `NAME=NUMBER,…`; a number alone is for everything.

    Raises Refused for what is no finite number.
    """
    rules = []
    for item in filter(None, (item.strip() for item in text.split(","))):
        name, equals, number = item.rpartition("=")
        if not equals and re.search("[A-Za-z]", item):
            raise Refused(f"{item!r} has no weight: give {item}=0.5, or --keep {item}.")
        rules.append((name.strip() if equals else "*", _number(number, item)))
    return Weights(tuple(rules))


def only(text: str) -> Weights:
    """Weights that keep the modules named, and nothing else."""
    return Weights((("*", 0.0), *((name, 1.0) for name in _listed(text))))


def without(text: str) -> Weights:
    """Weights that drop the modules named, and nothing else."""
    return Weights(tuple((name, 0.0) for name in _listed(text)))


def fits(name: str, spot: Spot) -> bool:
    """Whether a name of the grammar stands for a module."""
    if _block_fits(name, spot) or _word_fits(name, spot):
        return True
    return any(_block_fits(head, spot) and _word_fits(word, spot) for head, word in _halves(name))


def refuse_unknown(weights: Weights, plan: Plan, spots: Sequence[Spot]) -> None:
    """Refuse a name that is no block, part or word of the architecture, giving the nearest.

    A block that the architecture has and the file has not is no mistake.
    """
    known = [Spot("", name.partition(".")[0].lower(), name) for name in blocks(plan)]
    known = [each if each.part in ("te1", "te2") else _in_unet(each) for each in known]
    for name, _ in weights.rules:
        if any(fits(name, spot) for spot in (*known, *spots)) or _meant(name, known):
            continue
        near = difflib.get_close_matches(
            name.upper(), [*PARTS, "MID", *(each.block for each in known)], 2, 0
        )
        near += difflib.get_close_matches(name.lower(), WORDS, 1, 0.6)
        raise Refused(
            f"{name!r} is no block, part or word of a module's name in {plan.family}: did you mean "
            f"{' or '.join(near)}?"
        )


def _in_unet(spot: Spot) -> Spot:
    return Spot(spot.lora, "unet", spot.block)


def _meant(name: str, known: Iterable[Spot]) -> bool:
    """Whether a name has a known word, alone or behind a known block."""
    blocks_known = tuple(known)
    return name.lower() in WORDS or any(
        word.lower() in WORDS and any(_block_fits(head, spot) for spot in blocks_known)
        for head, word in _halves(name)
    )


def _halves(name: str) -> Iterator[tuple[str, str]]:
    for found in re.finditer(r"\.", name):
        yield name[: found.start()], name[found.end() :]


def _block_fits(name: str, spot: Spot) -> bool:
    wanted = _plain(name)
    if wanted in PARTS:
        return spot.part in PARTS[wanted]
    return fnmatchcase(spot.block, "MID*" if wanted == "MID" else wanted)


def _plain(name: str) -> str:
    """A block's name as it is written here: `in7` and chop_blocks' INP07 are IN07, IN00 is IN."""
    found = re.fullmatch(r"(?:(INP?|OUT|MID)|(TE[12])\.L)0*(\d+)", name.upper())
    if not found:
        return name.upper()
    if found[2]:
        return f"{found[2]}.L{int(found[3]):02}"
    if found[1] == "MID":
        return f"MID{found[3]}"
    head = found[1].removesuffix("P")
    return "IN" if (head, int(found[3])) == ("IN", 0) else f"{head}{int(found[3]):02}"


def _word_fits(word: str, spot: Spot) -> bool:
    if word.upper() in RESERVED:
        return False
    flat = word.lower().replace(".", "_")
    if re.search(r"[*?\[]", flat):
        return fnmatchcase(spot.lora, flat)
    return bool(re.search("[a-z]", flat)) and f"_{flat}_" in f"_{spot.lora}_"


def _listed(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if "=" in name:
            raise Refused(f"{name!r}: names to keep or drop have no weights: give --weights.")
    if not names:
        raise Refused("no block is named: give some, such as IN08,OUT01.")
    return names


def _number(text: str, item: str) -> float:
    try:
        number = float(text)
    except ValueError as error:
        raise Refused(f"{item!r}: {text!r} is no number; give a weight such as 0.5.") from error
    if not math.isfinite(number):
        raise Refused(f"{item!r}: a weight is a finite number.")
    return number
