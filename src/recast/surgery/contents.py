"""What an adapter holds, block by block: modules, parameters, bytes, ranks, share of the change.

energy of a block = sum ||dW||^2 over its modules / the same over all        dW = alpha / r B A
||B A||^2 = sum (B^T B) * (A A^T)                                  from the thin factors alone
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from recast.adapter.formats import FULL_SUFFIXES, Raw, Tensors, plain_factors
from recast.errors import Refused
from recast.layout import Layout, Plan
from recast.lowrank import LowRank, squared_norm
from recast.surgery.blocks import Spot, architecture, blocks, spot
from recast.surgery.guard import refuse_principal

KNOWN = {"lora_up.weight", "lora_down.weight", "lora_mid.weight", "alpha", *FULL_SUFFIXES}


@dataclass(frozen=True)
class Held:
    """A module of a file: where it lies and what it takes.

    bytes: of its tensors. rank None where it has no factors. foreign: the suffixes of another
    parametrization (DoRA, LoKr …), whose change is not known without the base.
    """

    spot: Spot
    tensors: Tensors
    parameters: int
    bytes: int
    rank: int | None
    foreign: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """A block, or all: sums over its modules; energy is its share, None where it is not known."""

    block: str
    modules: int
    parameters: int
    bytes: int
    ranks: tuple[int, ...]
    energy: float | None


def held(raw: Raw, path: Path, layout: Layout | None = None) -> tuple[list[Held], Plan]:
    """The modules of an open adapter in the order of the network, and their architecture.

    Refuses a principal adapter, mixed architectures, and names that belong to no block.
    """
    refuse_principal(path, raw.metadata)
    plan = layout.plan if layout else raw.plan
    plan = plan or architecture(raw.modules, raw.metadata, str(path))
    known = {block: i for i, block in enumerate(blocks(plan))}
    spots = {lora: spot(lora, plan.unet.layers) for lora in raw.modules}
    lost = [lora for lora, found in spots.items() if found is None or found.block not in known]
    if lost:
        raise Refused(
            f"{len(lost)} of {len(spots)} modules of {path} are none of this architecture "
            f"({plan.family}), first {', '.join(lost[:3])}; name the checkpoint it was made for "
            "with --model."
        )
    found = [_held(there, raw.modules[lora]) for lora, there in spots.items() if there]
    return sorted(found, key=lambda each: known[each.spot.block]), plan


def _held(where: Spot, tensors: Mapping[str, object]) -> Held:
    assert isinstance(tensors, Tensors)
    specs = [tensors.spec(suffix) for suffix in tensors.keys_in_file]
    factors = [tensors.spec(s) for s in tensors.keys_in_file if s != "alpha"]
    down = tensors.keys_in_file.get("lora_down.weight")
    return Held(
        where,
        tensors,
        sum(spec.numel for spec in factors),
        sum(spec.nbytes for spec in specs),
        tensors.spec("lora_down.weight").shape[0] if down else None,
        tuple(suffix for suffix in tensors.keys_in_file if suffix not in KNOWN),
    )


def energy(path: Path, module: Held) -> float | None:
    """||dW||^2 of a module, with that of its bias; None for a foreign parametrization.

    Raises Refused for NaN or infinity.
    """
    if module.foreign:
        return None
    total = 0.0
    if module.rank is not None:
        up, down = plain_factors(path, module.spot.lora, module.tensors)
        alpha = module.tensors["alpha"].double().item() if "alpha" in module.tensors else None
        scale = 1.0 if alpha is None else alpha / module.rank
        total += scale**2 * squared_norm(LowRank(up, down))
    for suffix in FULL_SUFFIXES.keys() & module.tensors.keys_in_file.keys():
        total += module.tensors[suffix].double().square().sum().item()
    if not math.isfinite(total):
        raise Refused(f"{path}: {module.spot.lora} holds NaN or infinity; take an earlier save.")
    return total


def rows(
    modules: list[Held], energies: Mapping[str, float | None], *, whole_texts: bool = False
) -> list[Row]:
    """A row for each block that the file has, in the order of the network, and one for all.

    whole_texts: one row for a text encoder.
    """
    known = [value for value in energies.values() if value is not None]
    whole = sum(known)
    groups: dict[str, list[Held]] = {}
    for module in modules:
        block = module.spot.block
        if whole_texts and module.spot.part != "unet":
            block = module.spot.part.upper()
        groups.setdefault(block, []).append(module)
    groups["all"] = modules
    return [_row(block, found, energies, whole) for block, found in groups.items()]


def _row(block: str, found: list[Held], energies: Mapping[str, float | None], whole: float) -> Row:
    mine = [energies[module.spot.lora] for module in found]
    known = [value for value in mine if value is not None]
    return Row(
        block,
        len(found),
        sum(module.parameters for module in found),
        sum(module.bytes for module in found),
        tuple(sorted({module.rank for module in found if module.rank is not None})),
        sum(known) / whole if known and whole else None,
    )
