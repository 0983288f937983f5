"""Parts of adapters by traits, and adapters from parts: tensors are copied, each with its alpha.

    w      a file's strength, multiplied into `up` or the full change, once; 1 copies bytes

Of files that differ in alpha the commonest is written for all, and alpha / that folded into `up`,
because diffusers gives every layer the majority's. A module that two files hold is refused: the sum
of two changes is `recast join`'s business, and dropping one silently nobody's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from recast.adapter.export import write_pairs
from recast.adapter.file import kohya_hashes
from recast.adapter.formats import FULL_SUFFIXES, LOW_RANK_SUFFIXES, Raw, Tensors, open_raw
from recast.adapter.pairs import Pair, commonest, taken
from recast.checkpoint import write
from recast.commit import refuse_target
from recast.errors import Refused
from recast.layout import Layout
from recast.surgery.blocks import architecture
from recast.surgery.copying import Copy, alpha_in, copied
from recast.surgery.guard import refuse_principal
from recast.surgery.header import HASHES, Size, stated
from recast.surgery.traits import COMPONENTS, TRAITS, Trait, chosen

KNOWN = LOW_RANK_SUFFIXES | set(FULL_SUFFIXES)
VERBATIM = ("kohya", "comfy")  # formats without a configuration: a module is its tensors
AGREED = ("recast.base_sha256", "recast.family", "recast.objective")


@dataclass(frozen=True)
class Cutting:
    """What is taken of one file: modules of any of the traits (none: all), times a strength."""

    path: Path
    traits: tuple[Trait, ...] = ()
    strength: float = 1.0


@dataclass(frozen=True)
class Part:
    """An open file and the modules taken of it; empty: what is written as zeros beside them."""

    cutting: Cutting
    raw: Raw
    loras: tuple[str, ...]
    empty: frozenset[str]


@dataclass(frozen=True)
class Sliced:
    """Files written, and how many modules came from each source."""

    files: tuple[Path, ...]
    modules: Mapping[Path, int]


def assemble(
    cuttings: Sequence[Cutting],
    out: Path,
    *,
    texts: Path | None = None,
    layout: Layout | None = None,
    force: bool = False,
) -> Sliced:
    """Write the chosen modules of some adapters as one, in their form if they share one.

    texts: the text encoders' modules come from this file alone. Files of different forms become a
    kohya file. Raises Refused for principal adapters, mixed architectures, modules that two files
    hold, and where nothing would be left.
    """
    refuse_target(out, force=force, sources=[c.path for c in cuttings if c.path.is_file()])
    with ExitStack() as files:
        parts = [_part(c, files.enter_context(open_raw(c.path, layout, strangers=True)),
                       no_texts=texts is not None) for c in cuttings]  # fmt: skip
        if texts is not None:
            raw = files.enter_context(open_raw(texts, layout, strangers=True))
            parts.append(_part(Cutting(texts, (TRAITS["te"],)), raw, no_texts=False))
        _account(parts, layout)
        forms = {part.raw.form for part in parts}
        form = forms.pop() if len(forms) == 1 else "kohya"
        same = form in VERBATIM and all(part.raw.form == form for part in parts)
        write_parts = _copy if same else _rewrite
        return Sliced(
            tuple(write_parts(parts, out, form, force)),
            {part.cutting.path: len(part.loras) for part in parts},
        )


def split_up(
    source: Path,
    folder: Path,
    traits: Mapping[str, Trait] | None = None,
    *,
    layout: Layout | None = None,
    force: bool = False,
) -> Sliced:
    """Write each trait's modules to a file of its own in a folder; without traits, each part's.

    Traits that have no module give no file.
    """
    wanted = {name: TRAITS[name] for name in COMPONENTS} if traits is None else traits
    with open_raw(source, layout, strangers=True) as raw:
        refuse_principal(source, raw.metadata)
        there = [name for name, trait in wanted.items() if chosen(raw.modules, [trait])]
        tail = "" if raw.form == "peft" else ".safetensors"
    if not there:
        raise Refused(f"{source} has no module of {', '.join(wanted)}, so nothing is written.")
    targets = {name: folder / f"{name}{tail}" for name in there}
    for target in targets.values():
        refuse_target(target, force=force, sources=[source] if source.is_file() else [])
    made = [
        assemble([Cutting(source, (wanted[name],))], targets[name], layout=layout, force=force)
        for name in there
    ]
    files = tuple(file for one in made for file in one.files)
    return Sliced(
        files, {targets[n]: one.modules[source] for n, one in zip(there, made, strict=True)}
    )


def _part(cutting: Cutting, raw: Raw, *, no_texts: bool) -> Part:
    refuse_principal(cutting.path, raw.metadata)
    loras = chosen(raw.modules, cutting.traits) if cutting.traits else list(raw.modules)
    if no_texts:
        loras = [lora for lora in loras if not lora.startswith("lora_te")]
    if not loras:
        first = ", ".join(list(raw.modules)[:2])
        raise Refused(
            f"{cutting.path}: none of its {len(raw.modules)} modules is chosen, such as {first}; "
            "compare the patterns with these names."
        )
    strange = [lora for lora in loras if raw.modules[lora].keys() - KNOWN]
    if strange and cutting.strength != 1:
        raise Refused(
            f"{cutting.path}: {strange[0]} is no plain change of weights, so its strength cannot "
            "be set; take it as it is."
        )
    # diffusers drops a text encoder's attention that has no out_proj
    heads = {f"{lora.rpartition('_self_attn_')[0]}_self_attn_out_proj"
             for lora in loras if "_self_attn_" in lora and lora not in strange}  # fmt: skip
    empty = frozenset((heads & raw.modules.keys()) - set(loras))
    return Part(cutting, raw, tuple(loras), empty)


def _account(parts: Sequence[Part], layout: Layout | None) -> None:
    """Refuse modules that two files hold, mixed architectures and mixed objectives."""
    holder: dict[str, Path] = {}
    for part in parts:
        for lora in part.loras:
            if lora in holder:
                raise Refused(
                    f"{holder[lora]} and {part.cutting.path} both hold {lora}: choose different "
                    "traits of them, or add their changes with recast join."
                )
            holder[lora] = part.cutting.path
    if layout is None:
        about = {k: v for part in reversed(parts) for k, v in part.raw.metadata.items()}
        architecture(holder, about, " with ".join(str(part.cutting.path) for part in parts))
    said = {
        part.cutting.path: part.raw.metadata["recast.objective"]
        for part in parts
        if part.raw.metadata.get("recast.objective")
        and any(lora.startswith("lora_unet_") for lora in part.loras)
    }
    if len(set(said.values())) > 1:
        listed = ", ".join(f"{path} for {objective}" for path, objective in said.items())
        raise Refused(f"the files are for different objectives ({listed}): join those of one.")


def _copy(parts: Sequence[Part], out: Path, form: str, force: bool) -> list[Path]:
    """One file of tensors as they are, but for strengths and alphas that differ."""
    alpha = _common_alpha(parts)
    held = {lora for part in parts for lora in part.loras}
    copies: dict[str, Copy] = {}
    sizes = []
    for part in parts:
        for lora in (*part.loras, *sorted(part.empty - held)):
            tensors = part.raw.modules[lora]
            assert isinstance(tensors, Tensors)
            weight = 0.0 if lora in part.empty else part.cutting.strength
            copies |= copied(tensors, weight, alpha)
            if "lora_down.weight" in tensors:
                shape = tensors.spec("lora_down.weight").shape
                own = alpha_in(tensors) if alpha is None else alpha
                sizes.append(Size(shape[0], own, max(shape[2:], default=1) > 1))
    specs = {key: copy.spec() for key, copy in copies.items()}
    header = stated(_about(parts), sizes)
    if form == "kohya":
        header |= kohya_hashes(specs, lambda key: copies[key].read(), header)
    sources = [part.cutting.path for part in parts if part.cutting.path.is_file()]
    stream = ((key, copies[key].read()) for key in specs)
    write(out, specs, stream, header, force=force, sources=sources)
    return [out]


def _common_alpha(parts: Sequence[Part]) -> float | None:
    """The alpha that all of several files' modules get where they differ; None: as they are."""
    if len(parts) == 1:
        return None
    modules = [part.raw.modules[lora] for part in parts for lora in part.loras]
    alphas = [
        alpha_in(tensors)
        for tensors in modules
        if isinstance(tensors, Tensors) and "lora_down.weight" in tensors
    ]
    return float(commonest(alphas)) if len(set(alphas)) > 1 else None


def _rewrite(parts: Sequence[Part], out: Path, form: str, force: bool) -> list[Path]:
    """PEFT and diffusers files, whose configurations are made anew, and mixtures."""
    pairs: dict[str, Pair] = {}
    full: dict[str, Tensor] = {}
    for part in parts:
        modules = {lora: dict(part.raw.modules[lora]) for lora in part.loras}
        strange = [lora for lora, tensors in modules.items() if tensors.keys() - KNOWN]
        if strange:
            raise Refused(
                f"{part.cutting.path}: {strange[0]} is no plain change of weights, which can only "
                "be sliced in kohya's or ComfyUI's form."
            )
        found, whole = taken(part.cutting.path, replace(part.raw, modules=modules), None)
        weight = part.cutting.strength
        pairs |= {lora: pair.stronger(weight) for lora, pair in found.items()}
        full |= {name: (t.double() * weight).to(t.dtype) for name, t in whole.items()}
    plan = next((part.raw.plan for part in parts if part.raw.plan), None)
    names = " with ".join(str(part.cutting.path) for part in parts)
    return write_pairs(out, form, pairs, full, _about(parts), plan, Path(names), force=force)


def _about(parts: Sequence[Part]) -> dict[str, str]:
    """The first file's header, without what the others contradict; and where all came from."""
    first, *rest = (part.raw.metadata for part in parts)
    found = {k: v for k, v in first.items() if k not in HASHES}
    for key in AGREED:
        if any(other.get(key, found.get(key)) != found.get(key) for other in rest):
            found.pop(key, None)
    came = [
        {
            "of": part.cutting.path.name,
            "modules": len(part.loras),
            "strength": part.cutting.strength,
        }
        for part in parts
    ]
    return found | {"recast.slice": json.dumps(came)}
