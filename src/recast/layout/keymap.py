"""Which tensor of a file is which parameter of a module.

Traced, not written down: tensors whose every value is unique go through diffusers' own single-file
converters, and where the values come out tells name, slice and transposition.  A converter's names
depend on the topology, not on widths, so a plan is traced at widths of a few numbers and takes well
under a second.  Each value must come out exactly once, or the trace is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from recast.errors import Refused
from recast.layout.blueprint import Plan, TextPlan, blueprint
from recast.layout.names import TEXTS, UNET, VAE

if TYPE_CHECKING:
    from torch import Tensor

    from recast.layout.layout import Layout


@dataclass(frozen=True)
class Entry:
    """One module parameter and where it lies in the file.

    param = file[key][rows], transposed or without its trailing 1x1 kernel where so marked. rows:
    first and last + 1 row of a stacked tensor, None for the whole.
    """

    key: str
    part: str
    param: str
    rows: tuple[int, int] | None = None
    transpose: bool = False
    squeeze: bool = False


def keymap(layout: Layout) -> tuple[Entry, ...]:
    """Every parameter of every part of a layout, in the order of the blueprint."""
    return trace(layout.plan)


def from_file(
    entries: tuple[Entry, ...], checkpoint: Mapping[str, Tensor], part: str
) -> Iterator[tuple[str, Tensor]]:
    """Read the parameters of one part, a tensor at a time."""
    mine = (entry for entry in entries if entry.part == part)
    for key, group in groupby(mine, key=lambda entry: entry.key):
        tensor = checkpoint[key]
        for entry in group:
            yield entry.param, _taken(tensor, entry)


def to_file(
    entries: tuple[Entry, ...], parts: Mapping[str, Mapping[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """The inverse of from_file, for the parts given: {"unet": state_dict, …}."""
    import torch

    mine = (entry for entry in entries if entry.part in parts)
    for key, group in groupby(mine, key=lambda entry: entry.key):
        pieces = []
        for entry in sorted(group, key=lambda entry: entry.rows or (0, 0)):
            tensor = parts[entry.part][entry.param]
            tensor = tensor[:, :, None, None] if entry.squeeze else tensor
            pieces.append(tensor.T.contiguous() if entry.transpose else tensor)
        yield key, torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def _taken(tensor: Tensor, entry: Entry) -> Tensor:
    if entry.rows is not None:
        tensor = tensor[slice(*entry.rows)]
    if entry.squeeze:
        tensor = tensor[:, :, 0, 0]
    return tensor.T.contiguous() if entry.transpose else tensor


@cache
def trace(plan: Plan) -> tuple[Entry, ...]:
    """Trace a plan; raises Refused with the list of what does not come out exactly once."""
    import torch

    small = shrink(plan)
    tagged, count = {}, 0
    for key, shape in blueprint(small).items():
        size = torch.Size(shape).numel()
        tagged[key] = torch.arange(count, count + size).reshape(shape)
        count += size
    owners = _owners(tagged, count)
    real = blueprint(plan)
    keys = list(tagged)
    seen = torch.zeros(count, dtype=torch.int64)
    entries = []
    for part, converted in _convert(small, tagged).items():
        for param, values in converted.items():
            key = keys[owners[int(values.flatten()[0])]]
            entries.append(_entry(key, part, param, tagged[key], values, real[key][0]))
            seen[values.flatten()] += 1
    if bad := sorted({keys[owners[i]] for i in (seen != 1).nonzero().flatten().tolist()}):
        raise Refused(
            f"diffusers' converters do not carry {len(bad)} tensors over exactly once, "
            f"first {', '.join(bad[:5])}: install a diffusers version that Recast "
            "was tested with."
        )
    order = {key: index for index, key in enumerate(keys)}
    return tuple(sorted(entries, key=lambda entry: (order[entry.key], entry.rows or (0, 0))))


def shrink(plan: Plan) -> Plan:
    """The same topology at widths of a few numbers: equal widths stay equal, others differ."""

    def small(widths: tuple[int, ...]) -> tuple[int, ...]:
        ranks = {width: rank + 2 for rank, width in enumerate(sorted(set(widths)))}
        return tuple(ranks[width] for width in widths)

    def text(found: TextPlan | None, width: int) -> TextPlan | None:
        if found is None:
            return None
        projection = None if found.projection is None else 3
        return replace(
            found, width=width, hidden=2, vocabulary=2, positions=2, projection=projection
        )

    unet = replace(plan.unet, widths=small(plan.unet.widths), context=2)
    if unet.vector is not None:
        unet = replace(unet, vector=2)
    vae = None if plan.vae is None else replace(plan.vae, widths=small(plan.vae.widths))
    return Plan(plan.family, unet, vae, text(plan.te1, 2), text(plan.te2, 3))


def _convert(plan: Plan, tagged: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Send a file through diffusers' converters."""
    from diffusers.loaders import single_file_utils as theirs

    def below(prefix: str) -> dict[str, Tensor]:
        return {key: value for key, value in tagged.items() if key.startswith(prefix)}

    found = {"unet": theirs.convert_ldm_unet_checkpoint(below(UNET), _unet_facts(plan))}
    prefixes = TEXTS[plan.family]
    if plan.te1:
        flat = theirs.convert_ldm_clip_checkpoint(below(prefixes["te1"]))
        # CLIPTextModel has had no text_model level since transformers 5.6; diffusers strips it too
        found["te1"] = {key.removeprefix("text_model."): value for key, value in flat.items()}
    if plan.te2:
        stub = SimpleNamespace(config=SimpleNamespace(hidden_size=plan.te2.width))
        inside = below(prefixes["te2"])
        found["te2"] = theirs.convert_open_clip_checkpoint(stub, inside, prefixes["te2"])
    if plan.vae:
        config = {name: [None] * len(plan.vae.widths) for name in VAE_BLOCKS}
        found["vae"] = theirs.convert_ldm_vae_checkpoint(below(VAE), config)
    return found


VAE_BLOCKS = ("down_block_types", "up_block_types")


def _unet_facts(plan: Plan) -> dict[str, Any]:
    """What the converter looks up in a UNet's configuration."""
    kind = None if plan.unet.vector is None else "text_time"
    return {"layers_per_block": plan.unet.layers, "addition_embed_type": kind}


def _owners(tagged: Mapping[str, Tensor], count: int) -> list[int]:
    """For each value the index of the tensor that holds it."""
    owners = [0] * count
    for index, values in enumerate(tagged.values()):
        first = int(values.flatten()[0])
        owners[first : first + values.numel()] = [index] * values.numel()
    return owners


def _entry(
    key: str, part: str, param: str, source: Tensor, values: Tensor, real_rows: int
) -> Entry:
    """How `values` was cut from `source`; rows are scaled to the real tensor's."""
    import torch

    def same(other: Tensor) -> bool:
        return other.shape == values.shape and bool(torch.equal(other, values))

    if same(source):
        return Entry(key, part, param)
    if source.ndim == 2 and same(source.T):
        return Entry(key, part, param, transpose=True)
    if source.ndim == 4 and same(source[:, :, 0, 0]):
        return Entry(key, part, param, squeeze=True)
    width = source[0].numel()
    first = (int(values.flatten()[0]) - int(source.flatten()[0])) // width
    rows = [row * real_rows for row in (first, first + len(values))]
    if same(source[first : first + len(values)]) and not any(row % len(source) for row in rows):
        return Entry(key, part, param, rows=(rows[0] // len(source), rows[1] // len(source)))
    raise Refused(
        f"diffusers' converters change {key} into {param} in a way that Recast does not "
        "know: install a diffusers version that Recast was tested with."
    )
