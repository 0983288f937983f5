"""The page of an exploration: pictures of every block, ticks, the vector and file size they give.

One HTML file that asks the network for nothing; its only script adds up what is ticked.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recast.checkpoint import Checkpoint
from recast.evaluate.pictures import embedded, png
from recast.events import amount
from recast.layout import Plan
from recast.surgery.explore import Explored, Group, Seen
from recast.surgery.vectors import BASE, DIALECTS, NUMBERED

PIXELATED = 160
LONGEST = 320  # pixels of a picture on the page
FAINTEST = 1 / 255  # no weaker difference is shown as strong as can be


def page(seen: Explored, plan: Plan, energies: dict[str, float | None], name: str) -> str:
    """The page as one string; name: the adapter's file name."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("recast.surgery"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    whole = sum(value for value in energies.values() if value)
    times = strength(seen.none.pictures, seen.whole.pictures)
    rows = [_row(group, seen, energies, whole, times) for group in seen.groups]
    side = seen.whole.pictures[0].shape[-1]
    return environment.get_template("explore.html.j2").render(
        name=name,
        setting=seen.setting,
        count=len(seen.setting.prompts),
        times=times,
        rows=rows,
        bare=_strip(seen.none.pictures),
        whole=_strip(seen.whole.pictures),
        bare_likeness=seen.none.likeness,
        chosen=seen.chosen,
        chosen_picture=_strip(seen.chosen_seen.pictures) if seen.chosen_seen else "",
        chosen_likeness=seen.chosen_seen.likeness if seen.chosen_seen else math.nan,
        chosen_kept=seen.chosen_seen.kept if seen.chosen_seen else math.nan,
        pixelated=side <= PIXELATED,
        amount=amount,
        data=_script(seen, plan, name),
    )


def file_size(groups: Sequence[Group], chosen: Sequence[str]) -> int:
    """Bytes of a file of these groups: tensors, their lines in the header, and the metadata."""
    file = groups[0].modules[0].tensors.file
    return _head(file) + sum(_bytes(group) for group in groups if group.name in chosen)


def _row(
    group: Group, seen: Explored, energies: dict[str, float | None], whole: float, times: float
) -> dict[str, Any]:
    known = [value for m in group.modules if (value := energies[m.spot.lora]) is not None]
    return {
        "name": group.name,
        "modules": f"{len(group.modules)} module{'s' * (len(group.modules) > 1)}",
        "bytes": amount(group.bytes),
        "energy": 100 * sum(known) / whole if known and whole else None,
        "ticked": group.name in seen.chosen,
        "alone": _shown(seen.alone[group.name], seen.none.pictures, times),
        "without": _shown(seen.without[group.name], seen.whole.pictures, times),
    }


def _shown(found: Seen, reference: tuple[Tensor, ...], times: float) -> dict[str, Any]:
    pairs = zip(found.pictures, reference, strict=True)
    return {
        "picture": _strip(found.pictures),
        "difference": _strip([heat(a, b, times) for a, b in pairs]),
        "likeness": found.likeness,
        "kept": found.kept,
    }


def strength(none: Sequence[Tensor], whole: Sequence[Tensor]) -> float:
    """How much stronger differences are shown: the adapter's largest one as strong as can be."""
    far = max(_far(a, b).max().item() for a, b in zip(none, whole, strict=True))
    return 1 / max(far, FAINTEST)


def heat(one: Tensor, other: Tensor, times: float) -> Tensor:
    """How far two pictures (3, H, W) are apart by pixel: black, red, yellow, white; (3, H, W)."""
    far = (times * _far(one, other)).clamp(0, 1)
    return torch.stack([(3 * far - k).clamp(0, 1) for k in range(3)]) * 2 - 1


def _far(one: Tensor, other: Tensor) -> Tensor:
    """By pixel, from 0 to 1; (H, W)."""
    return (one - other).abs().mean(0) / 2


def _strip(pictures: Sequence[Tensor]) -> str:
    """Pictures of one height side by side, as a data URI."""
    tallest = max(picture.shape[1] for picture in pictures)
    padded = [
        torch.nn.functional.pad(p, (0, 0, 0, tallest - p.shape[1]), value=1.0) for p in pictures
    ]
    return embedded(png(torch.cat(padded, 2)), longest=LONGEST * len(pictures))


def _script(seen: Explored, plan: Plan, name: str) -> str:
    """What the page's script adds up, as JSON that may stand inside a script element."""
    names = [group.name for group in seen.groups]
    file = seen.groups[0].modules[0].tensors.file
    several = len({module.tensors.file.path for group in seen.groups for module in group.modules})
    dialects = {
        str(dialect.length): [_members(dialect.blocks(label), label, names, dialect.covered)
                              for label in dialect.labels]
        for dialect in DIALECTS.values()
        if dialect.family == plan.family
        and not {n for n in names if NUMBERED.fullmatch(n)} - dialect.covered
    }  # fmt: skip
    data = {
        "file": name,
        "out": "small" if several > 1 else "small.safetensors",
        "base": _head(file) * several,
        "bytes": {group.name: _bytes(group) for group in seen.groups},
        "dialects": dialects,
    }
    return json.dumps(data).replace("<", "\\u003c")


def _members(blocks: tuple[str, ...], label: str, names: list[str], covered: set[str]) -> list[str]:
    """The groups that one number of a vector stands for."""
    if label != BASE:
        return [name for name in names if name in blocks]
    return [name for name in names if name not in covered]


def _bytes(group: Group) -> int:
    """Tensors of a group and their lines in the header."""
    total = group.bytes
    for module in group.modules:
        specs = module.tensors.file.specs
        for key in module.tensors.keys_in_file.values():
            spec = specs[key]
            offsets = [spec.start, spec.end]
            entry = {key: {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": offsets}}
            total += len(json.dumps(entry, separators=(",", ":"), ensure_ascii=False)) - 1
    return total


def _head(file: Checkpoint) -> int:
    """Length and metadata of a file."""
    metadata = {"__metadata__": file.metadata}
    return 8 + len(json.dumps(metadata, separators=(",", ":"), ensure_ascii=False).encode())
