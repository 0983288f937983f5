"""What an adapter file is, said from its header and its alphas: part of `recast inspect`, no torch.

`seen` sorts the keys of any of the four formats by modules, `misread` says which programs would
take the file for something else than it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from recast.adapter_facts.misread import misreadings
from recast.adapter_facts.seen import Module, Seen, family, look
from recast.checkpoint import Checkpoint
from recast.layout.names import PART_NAMES

__all__ = ["adapter_facts"]

Facts = dict[str, Any]
FEW = 8


def adapter_facts(files: Sequence[tuple[Checkpoint, str]]) -> Facts:
    """Parts, kinds, ranks and alphas of an adapter's files, and what loaders make of them.

    files: with the part each is for ("" where only its names can say); a PEFT folder has several.
    """
    seen = look(files)
    meta = seen.metadata
    low = [module for module in seen.modules if module.rank is not None]
    alphas = Counter(module.alpha for module in low)
    order = sorted(alphas, key=lambda alpha: (alpha is None, alpha or 0))
    parts = Counter(module.part or "other" for module in seen.modules)
    return {
        "format": seen.form,
        "family": family(seen),
        "role": meta.get("recast.role"),
        "modules": {p: parts[p] for p in [*PART_NAMES, "other"] if parts[p]},
        "kinds": dict(Counter(kind for module in seen.modules for kind in kinds(module))),
        "ranks": grouped(Counter(module.rank for module in low if module.rank)),
        "alphas": {"none" if a is None else f"{a:g}": alphas[a] for a in order},
        "base_sha256": meta.get("recast.base_sha256") or meta.get("ss_new_sd_model_hash"),
        "objective": {"name": meta.get("recast.objective"), "evidence": [], "contradictions": []},
        "loaders": [{"loader": loader, "note": note} for loader, note in misreadings(seen)],
        "problems": list(problems(seen)),
    }


def grouped(counts: Counter[int]) -> dict[str, int]:
    """How many layers have which rank; of more than FEW ranks those between powers of two."""
    if len(counts) <= FEW:
        return {str(rank): counts[rank] for rank in sorted(counts)}
    found: dict[str, int] = {}
    for rank in sorted(counts):
        top = 1 << (rank - 1).bit_length()
        name = f"{top // 2 + 1} to {top}" if top > 2 else str(rank)
        found[name] = found.get(name, 0) + counts[rank]
    return found


def kinds(module: Module) -> list[str]:
    """What a module changes, in words."""
    found = list(module.foreign)
    if module.rank is not None:
        wide = len(module.shapes["lora_down.weight"]) > 2
        tucker = "lora_mid.weight" in module.shapes
        found.append("Tucker" if tucker else "low-rank convolution" if wide else "low-rank matrix")
    weight = module.shapes.get("diff", module.shapes.get("w_norm"))
    if weight is not None:
        found.append("full weight" if len(weight) > 1 else "norm")
    elif module.shapes.keys() & {"diff_b", "b_norm"}:
        found.append("bias alone")
    return found


def problems(seen: Seen) -> list[str]:
    """Why the file is unsound, or not one that Recast reads."""
    found = list(seen.problems)
    if seen.odd:
        first = ", ".join(seen.odd[:5])
        found.append(f"{len(seen.odd)} keys belong to no adapter that Recast knows, first {first}")
    half = [m.name for m in seen.modules if m.rank is None and m.shapes.keys() & {
        "lora_up.weight", "lora_down.weight", "lora_mid.weight"}]  # fmt: skip
    if half:
        found.append(f"{len(half)} modules lack one of their two factors, first {half[0]}")
    strange = [module.name for module in seen.modules if not module.part]
    if strange:
        first = ", ".join(strange[:5])
        found.append(f"{len(strange)} modules are none of SDXL or SD 1.5, first {first}")
    foreign = sorted({kind for module in seen.modules for kind in module.foreign})
    if foreign:
        found.append(
            f"{', '.join(foreign)}: no change of weights with factors, so Recast does not read "
            "the file; merge it into its checkpoint with the tool that made it, then use "
            "recast extract --tuned"
        )
    return found
