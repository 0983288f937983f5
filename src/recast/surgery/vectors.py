"""The block vectors of other tools, read and written; inside, weights go by names.

    12  SDXL, LoRA             BASE IN04 IN05 IN07 IN08 MID OUT00 … OUT05
    17  SD 1.5, LoRA           BASE IN01 IN02 IN04 IN05 IN07 IN08 MID OUT03 … OUT11
    20  SDXL, LyCORIS          BASE IN00 … IN08 MID OUT00 … OUT08          LoRA Block Weight
    21  SDXL, LyCORIS          BASE IN01 … IN08 MID0 MID1 MID2 OUT00 … OUT08    chop_blocks, Inspire
    26  SD 1.5, LyCORIS        BASE IN00 … IN11 MID OUT00 … OUT11
    27  SD 1.5, LyCORIS        BASE IN01 … IN11 MID0 MID1 MID2 OUT00 … OUT11    Inspire

BASE is everything outside the numbered blocks: text encoders, time and label embedding, the layers
at the ends; IN00, where a vector has it, is the first of the UNet: TIME, LABEL, IN. Inspire and
chop_blocks count positions among the blocks that a file has; here a number belongs to its name, and
a vector without a number for a block of the file is refused.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from recast.errors import Refused
from recast.layout.blueprint import Plan
from recast.surgery.blocks import Spot, blocks
from recast.surgery.weights import Weights, parse

BASE = "BASE"
NUMBERED = re.compile(r"(IN|OUT)\d\d|MID\d")
FAMILIES = {"sdxl": "SDXL", "sd15": "SD 1.5"}


@dataclass(frozen=True)
class Dialect:
    """One kind of vector: for which family, and the label of each number."""

    family: str
    labels: tuple[str, ...]

    @property
    def length(self) -> int:
        return len(self.labels)

    def blocks(self, label: str) -> tuple[str, ...]:
        """The blocks that a number other than the first stands for."""
        several = {"IN00": ("TIME", "LABEL", "IN"), "MID": ("MID0", "MID1", "MID2")}
        return several.get(label, (label,))

    @property
    def covered(self) -> set[str]:
        """All blocks that have a number of their own."""
        return {block for label in self.labels[1:] for block in self.blocks(label)}


def _run(head: str, first: int, last: int) -> tuple[str, ...]:
    return tuple(f"{head}{i:02}" for i in range(first, last + 1))


_CROSS = ("IN04", "IN05", "IN07", "IN08", "MID")
_MIDDLES = ("MID0", "MID1", "MID2")
DIALECTS = {
    found.length: found
    for found in (
        Dialect("sdxl", (BASE, *_CROSS, *_run("OUT", 0, 5))),
        Dialect("sd15", (BASE, "IN01", "IN02", *_CROSS, *_run("OUT", 3, 11))),
        Dialect("sdxl", (BASE, *_run("IN", 0, 8), "MID", *_run("OUT", 0, 8))),
        Dialect("sdxl", (BASE, *_run("IN", 1, 8), *_MIDDLES, *_run("OUT", 0, 8))),
        Dialect("sd15", (BASE, *_run("IN", 0, 11), "MID", *_run("OUT", 0, 11))),
        Dialect("sd15", (BASE, *_run("IN", 1, 11), *_MIDDLES, *_run("OUT", 0, 11))),
    )
}


def _ones(length: int, *runs: tuple[int, int]) -> str:
    """A vector of zeros with ones at the first place and in runs of places."""
    inside = {0, *(i for first, last in runs for i in range(first, last + 1))}
    return ",".join("1" if i in inside else "0" for i in range(length))


def _all(length: int, value: str) -> str:
    return ",".join([value] * length)


# Inspire's names; the vectors are what its node takes
PRESETS = {
    "SD-NONE": _all(17, "0"), "SD-ALL": _all(17, "1"), "SD-ALL0.5": _all(17, "0.5"),
    "SD-INS": _ones(17, (1, 3)), "SD-IND": _ones(17, (4, 6)), "SD-INALL": _ones(17, (1, 6)),
    "SD-MIDD": _ones(17, (4, 11)), "SD-OUTD": _ones(17, (8, 11)), "SD-OUTS": _ones(17, (12, 16)),
    "SD-OUTALL": _ones(17, (8, 16)),
    "SD-MIDD0.2": "1,0,0,0,0,0,0.2,0.4,0.4,0.2,0,0,0,0,0,0,0",
    "SD-MIDD0.8": "1,0,0,0,0,0.5,0.8,0.8,0.4,0,0,0,0,0,0,0,0",
    "SD-MOUT": "1,0,0,0,0,0,1,1,1,1,1,1,1,1,0.5,0,0",
    "SD-ROUT": _all(8, "1") + "," + _all(9, "R"),
    "SD-AOUT": "A," + _all(11, "1") + "," + _all(5, "A"),
    "SD-AB": "A," + _all(11, "B") + "," + _all(5, "A"),
    "SD-LyC-NONE": _all(27, "0"), "SD-LyC-ALL": _all(27, "1"),
    "SD-LyC-INALL": _ones(27, (1, 11)), "SD-LyC-MIDALL": _ones(27, (12, 14)),
    "SD-LyC-OUTALL": _ones(27, (15, 26)),
    "SDXL-NONE": _all(12, "0"), "SDXL-ALL": _all(12, "1"), "SDXL-INALL": _ones(12, (1, 4)),
    "SDXL-MIDALL": _ones(12, (5, 5)), "SDXL-OUTALL": _ones(12, (6, 11)),
    "SDXL-LyC-NONE": _all(21, "0"), "SDXL-LyC-ALL": _all(21, "1"),
    "SDXL-LyC-INALL": _ones(21, (1, 8)), "SDXL-LyC-MIDALL": _ones(21, (9, 11)),
    "SDXL-LyC-OUTALL": _ones(21, (12, 20)),
}  # fmt: skip


def read_vector(
    text: str, plan: Plan, spots: Sequence[Spot], *, a: float = 4.0, b: float = 1.0, seed: int = 0
) -> Weights:
    """Weights from a vector, a preset's name or Inspire's `%default=1,in1-4=0.5`.

    a, b: what the letters stand for (small letters: half of it); R is a number from 0 to 3 and U
    from -1.5 to 1.5, drawn with the seed. Raises Refused for a wrong length, naming those that are
    accepted, another family's vector and blocks of the file that it has no number for.
    """
    text = text.strip()
    if text.startswith("%"):
        return _spec(text[1:], spots)
    text = PRESETS.get(text, text.rpartition(":")[2])
    items = [item.strip() for item in text.split(",")]
    if len(items) == 1 and re.search("[A-Za-z]", text):
        raise Refused(f"{text!r} is no vector and no preset: choose {', '.join(PRESETS)}.")
    dialect = _dialect(len(items), plan)
    missed = sorted({s.block for s in spots if NUMBERED.fullmatch(s.block)} - dialect.covered)
    if missed:
        others = [d for d in _of(plan) if not set(missed) - d.covered]
        raise Refused(
            f"a vector of {len(items)} has no number for {', '.join(missed)}, which the file has: "
            f"give one of {' or '.join(str(d.length) for d in others)}, or --weights with names."
        )
    drawn = random.Random(seed)
    numbers = [_value(item, a, b, drawn) for item in items]
    rules: list[tuple[str, float]] = [("*", numbers[0])]
    for label, number in zip(dialect.labels[1:], numbers[1:], strict=True):
        rules += [(block, number) for block in dialect.blocks(label)]
    return Weights(tuple(rules))


def write_vector(length: int, weights: Weights, plan: Plan, spots: Sequence[Spot]) -> str | None:
    """Weights as a vector of a length, None where two modules of one number differ.

    Where a file has no module for a number, the names of its blocks decide.
    """
    dialect = DIALECTS[length]
    label_of = {block: label for label in dialect.labels[1:] for block in dialect.blocks(label)}
    found: dict[str, set[float]] = {label: set() for label in dialect.labels}
    absent: dict[str, set[float]] = {label: set() for label in dialect.labels}
    for spot in spots:
        found[label_of.get(spot.block, BASE)].add(weights.of(spot))
    for spot in _named(plan):
        if spot.block in label_of or not NUMBERED.fullmatch(spot.block):
            absent[label_of.get(spot.block, BASE)].add(weights.of(spot))
    values = [found[label] or absent[label] for label in dialect.labels]
    if any(len(each) != 1 for each in values):
        return None
    return ",".join(f"{each.pop():.10g}" for each in values)


def write_vectors(weights: Weights, plan: Plan, spots: Sequence[Spot]) -> dict[int, str]:
    """Weights as every vector of the family that can say them, by length."""
    texts = {d.length: write_vector(d.length, weights, plan, spots) for d in _of(plan)}
    there = {s.block for s in spots if NUMBERED.fullmatch(s.block)}
    return {n: text for n, text in texts.items() if text and not there - DIALECTS[n].covered}


def _of(plan: Plan) -> list[Dialect]:
    return [dialect for dialect in DIALECTS.values() if dialect.family == plan.family]


def _named(plan: Plan) -> list[Spot]:
    """A stand-in for each block of the UNet, whether or not a file has it."""
    return [Spot("", "unet", block) for block in blocks(plan) if not block.startswith("TE")]


def _dialect(length: int, plan: Plan) -> Dialect:
    accepted = "; ".join(
        f"{d.length} for {FAMILIES[d.family]} ({d.labels[0]}, {d.labels[1]} … {d.labels[-1]})"
        for d in DIALECTS.values()
    )
    if length not in DIALECTS:
        raise Refused(f"a vector of {length} is none that is known: {accepted}.")
    dialect = DIALECTS[length]
    if dialect.family != plan.family:
        raise Refused(
            f"a vector of {length} is for {FAMILIES[dialect.family]} and the file for "
            f"{FAMILIES[plan.family]}: give one of "
            f"{', '.join(str(d.length) for d in _of(plan))}."
        )
    return dialect


def _value(item: str, a: float, b: float, drawn: random.Random) -> float:
    letters = {"A": a, "a": a / 2, "B": b, "b": b / 2}
    if item in letters:
        return letters[item]
    if item in ("R", "r"):
        return round(drawn.uniform(0, 3), 2)
    if item in ("U", "u"):
        return round(drawn.uniform(-1.5, 1.5), 2)
    if " " in item:
        raise Refused(
            f"{item!r}: several weights for the parts of one block go by names here: give "
            "--weights, such as OUT01.attn2=0.5."
        )
    return parse(item).rules[0][1] if item else _empty()


def _empty() -> float:
    raise Refused("a vector has an empty place: give a number between every two commas.")


def _spec(text: str, spots: Sequence[Spot]) -> Weights:
    """Inspire's `%` form: in, mid, out with 1-based positions among the blocks that a file has."""
    there = {head: _present(head, spots) for head in ("IN", "MID", "OUT")}
    inner = [block for found in there.values() for block in found]
    default, base, later = 1.0, None, []
    for item in filter(None, (item.strip() for item in text.split(","))):
        found = re.fullmatch(r"(default|base|(in|mid|out)(?:(\d+)(?:-(\d+))?)?)=(.+)", item)
        if not found:
            raise Refused(f"{item!r} is none of default=1, base=1, in=1, in3=1, in1-4=0.5.")
        number = parse(f"*={found[5]}").rules[0][1]
        if found[1] == "default":
            default = number
        elif found[1] == "base":
            base = number
        else:
            first, last = int(found[3] or 1), int(found[4] or found[3] or 99)
            later += [(block, number) for block in there[found[2].upper()][first - 1 : last]]
    first_rule = ("*", default if base is None else base)
    return Weights((first_rule, *((block, default) for block in inner), *later))


def _present(head: str, spots: Sequence[Spot]) -> list[str]:
    """The blocks of a file that Inspire counts under a head, in order."""
    found = {s.block for s in spots if NUMBERED.fullmatch(s.block) and s.block.startswith(head)}
    first = ["IN"] if head == "IN" and any(s.block == "IN" for s in spots) else []
    return first + sorted(found)
