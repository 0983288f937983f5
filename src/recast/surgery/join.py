"""The sum of several adapters as one: factors side by side, or the best of a rank.

    dW = sum_i w_i s_i B_i A_i = [w_1 s_1 B_1, w_2 s_2 B_2, ...] [A_1; A_2; ...]

so the ranks add and nothing is lost but the rounding of one factor to the file's dtype; where all
w_i s_i are the same number it becomes the alpha, and every factor keeps its bits. Adding factors
entry by entry, as some tools do, is another sum: (B_1 + B_2)(A_1 + A_2). With a rank the sum is
re-factored from the thin factors (see `thin`). Full changes are summed; beside factors of the same
weight those are multiplied out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path

from recast.adapter.export import write_pairs
from recast.adapter.formats import FULL_SUFFIXES, Raw, open_raw
from recast.adapter.pairs import Pair, commonest
from recast.adapter.places import read_site
from recast.checkpoint import Checkpoint
from recast.commit import refuse_target
from recast.errors import Refused
from recast.layout import Layout, Plan, Site, detect
from recast.layout.peft import CONFIG, adapter_files
from recast.surgery.blocks import DIFFUSERS, SGM, Spot, architecture, spot
from recast.surgery.guard import refuse_principal
from recast.surgery.pieces import DORA, others, pieces, placed
from recast.surgery.rules import Cut
from recast.surgery.sums import Term, factors, rounded, suffixed, summed, widest
from recast.surgery.vectors import read_vector
from recast.surgery.weights import Weights, refuse_unknown

ONE_ALPHA = ("kohya", "comfy")


@dataclass(frozen=True)
class Input:
    """An adapter, its strength, and weights by block on top; vector: instead in another's form."""

    path: Path
    strength: float = 1.0
    weights: Weights = field(default_factory=Weights)
    vector: str | None = None


@dataclass(frozen=True)
class Joined:
    """Files written, modules, their ranks, and how many modules several inputs had."""

    files: tuple[Path, ...]
    modules: int
    ranks: tuple[int, ...]
    shared: int


def join(
    inputs: Sequence[Input],
    out: Path,
    *,
    cut: Cut | None = None,
    base: Checkpoint | None = None,
    form: str | None = None,
    dtype: str | None = None,
    force: bool = False,
) -> Joined:
    """Write the weighted sum of adapters, in their common form (else kohya's) unless given.

    cut: the rule of a re-factored sum; None keeps all of it. base: the checkpoint they are for,
    needed for DoRA and unusual architectures. Raises Refused for principal adapters, mixed
    architectures or objectives, sizes that differ, and an empty sum.
    """
    layout = None if base is None else detect(base)
    with ExitStack() as files:
        raws = [files.enter_context(open_raw(i.path, layout, strangers=True)) for i in inputs]
        for one, raw in zip(inputs, raws, strict=True):
            refuse_principal(one.path, raw.metadata)
        forms = {raw.form for raw in raws}
        shape = form or (forms.pop() if len(forms) == 1 else "kohya")
        target = out / CONFIG if shape == "peft" else out
        refuse_target(target, force=force, sources=[i.path for i in inputs if i.path.is_file()])
        plan = _plan(inputs, raws, layout)
        terms: dict[str, list[Term]] = {}
        loose: dict[str, list[Term]] = {}
        for one, raw in zip(inputs, raws, strict=True):
            _collect(one, raw, plan, base, terms, loose)
        if not terms and not loose:
            raise Refused("nothing is left of the adapters with these weights: give others.")
        about = _about(inputs, raws, plan, cut)
        return _write(terms, loose, out, shape, dtype, cut, about, _named(raws, layout), inputs,
                      force)  # fmt: skip


def _plan(inputs: Sequence[Input], raws: Sequence[Raw], layout: Layout | None) -> Plan:
    """The architecture of all; refuses mixtures of them, of objectives, and of spellings."""
    names = [lora for raw in raws for lora in raw.modules]
    where = " with ".join(str(one.path) for one in inputs)
    said = {
        str(one.path): raw.metadata["recast.objective"]
        for one, raw in zip(inputs, raws, strict=True)
        if raw.metadata.get("recast.objective")
    }
    if len(set(said.values())) > 1:
        listed = ", ".join(f"{path} for {objective}" for path, objective in said.items())
        raise Refused(f"the files are for different objectives ({listed}): join those of one.")
    if layout is not None:
        return layout.plan
    bare = [name.removeprefix("lora_unet_") for name in names]
    if any(map(SGM.match, bare)) and any(map(DIFFUSERS.match, bare)):
        raise Refused(
            f"{where} call the UNet's layers by different names (input_blocks, down_blocks): name "
            "the checkpoint they are for with --model, so that they can be told apart."
        )
    about = {k: v for raw in reversed(raws) for k, v in raw.metadata.items()}
    return architecture(names, about, where)


def _named(raws: Sequence[Raw], layout: Layout | None) -> Plan | None:
    """The plan that names are looked up in for writing; None lets the names decide."""
    if layout is not None:
        return layout.plan
    return next((raw.plan for raw in raws if raw.plan), None)


def _collect(
    one: Input,
    raw: Raw,
    plan: Plan,
    base: Checkpoint | None,
    terms: dict[str, list[Term]],
    loose: dict[str, list[Term]],
) -> None:
    """Add an input's pieces by module, its norms and biases by `module.suffix`."""
    spots = [where for lora in raw.modules if (where := spot(lora, plan.unet.layers))]
    weights = one.weights
    if one.vector is not None:
        weights = read_vector(one.vector, plan, spots) + weights
    refuse_unknown(weights, plan, spots)
    of = {each.lora: each for each in spots}
    found = pieces(one.path, raw)
    sites: Mapping[str, Site] = {}
    if base is not None:
        sites = placed(one.path, found, detect(base).sites("every"), str(base.path))
    for lora, piece in found.items():
        if DORA in piece.tensors and base is None:
            raise Refused(
                f"{one.path}: {lora} is DoRA, whose change depends on the weights it is made to: "
                "give the checkpoint with --model."
            )
        if weight := one.strength * _weight(weights, of.get(lora)):
            if base is not None:
                piece = replace(piece, weight=partial(read_site, base, sites[lora]))
            mine = terms.setdefault(lora, [])
            if mine and prod(_shape(mine[0])) != prod(piece.shape):
                raise Refused(
                    f"{one.path}: {lora} is {list(piece.shape)} and {list(_shape(mine[0]))} in "
                    "another of the files: join adapters of models of one size."
                )
            mine.append(Term(piece, weight))
    for lora, suffix in others(raw, found):
        if weight := one.strength * _weight(weights, of.get(lora)):
            name = f"{lora}.{FULL_SUFFIXES[suffix]}"
            loose.setdefault(name, []).append(Term(None, weight, raw.modules[lora][suffix]))


def _weight(weights: Weights, where: Spot | None) -> float:
    return 1.0 if where is None else weights.of(where)


def _shape(term: Term) -> tuple[int, ...]:
    assert term.piece is not None
    return term.piece.shape


def _write(
    terms: Mapping[str, list[Term]],
    loose: Mapping[str, list[Term]],
    out: Path,
    form: str,
    dtype: str | None,
    cut: Cut | None,
    about: dict[str, str],
    plan: Plan | None,
    inputs: Sequence[Input],
    force: bool,
) -> Joined:
    full = {name: summed(name, mine, dtype) for name, mine in suffixed(loose)}
    pairs: dict[str, Pair] = {}
    whole, alpha, scale = _alpha(terms, cut)
    for lora, mine in terms.items():
        form_of = dtype or widest(term.piece.dtype for term in mine if term.piece)
        if lora in whole:
            full[f"{lora}.diff"] = summed(lora, mine, form_of)
        elif (found := factors(mine, cut, f"{lora} of the sum")) is not None:
            rank = alpha if form in ONE_ALPHA else float(len(found[1]))
            pairs[lora] = rounded(*found, rank * scale, form_of, lora)
    if not pairs and not full:
        raise Refused("nothing is left of the sum by this rule: allow more rank.")
    about["recast.role"] = "delta" if pairs else "full"
    source = Path(" with ".join(str(one.path) for one in inputs))
    files = write_pairs(out, form, pairs, full, about, plan, source, force=force)
    ranks = tuple(pair.rank for pair in pairs.values())
    shared = sum(len(mine) > 1 for mine in terms.values())
    return Joined(tuple(files), len(terms), ranks, shared)


def _alpha(terms: Mapping[str, list[Term]], cut: Cut | None) -> tuple[set[str], float, float]:
    """The modules that stay full changes, the commonest rank to come, and the scale of all."""
    whole = {
        lora for lora, mine in terms.items()
        if cut is None and any(term.piece and term.piece.full for term in mine)
    }  # fmt: skip
    ranks, scales = [], set()
    for lora in terms.keys() - whole:
        mine = terms[lora]
        rank = sum(term.rank for term in mine)
        if cut is not None:
            conv = any(term.piece and term.piece.conv for term in mine)
            rank = min(rank, cut.cap(conv=conv) or rank)
        ranks.append(rank)
        scales |= {term.scale for term in mine} if cut is None else {1.0}
    same = scales.pop() if len(scales) == 1 else 1.0
    return whole, float(commonest(ranks)) if ranks else 1.0, same if same > 0 else 1.0


def _about(
    inputs: Sequence[Input], raws: Sequence[Raw], plan: Plan, cut: Cut | None
) -> dict[str, str]:
    """What all headers agree on, and what was joined: files by their hashes, with weights."""
    gone = ("sshs_", "ss_network_", "modelspec.hash", "recast.alpha", "recast.role", "recast.rank")
    first, *rest = (raw.metadata for raw in raws)
    found = {
        key: text for key, text in first.items()
        if not key.startswith(gone) and all(other.get(key) == text for other in rest)
    }  # fmt: skip
    said = [{"of": one.path.name, "sha256": hashes(one.path), "strength": one.strength,
             **({"weights": str(one.weights)} if one.weights.rules else {}),
             **({"vector": one.vector} if one.vector else {})} for one in inputs]  # fmt: skip
    found["recast.join"] = json.dumps({
        "inputs": said, "rank": None if cut is None else cut.most,
    })  # fmt: skip
    found.setdefault("recast.family", plan.family)
    objective = next((o for raw in raws if (o := raw.metadata.get("recast.objective"))), None)
    return found | ({"recast.objective": objective} if objective else {})


def hashes(path: Path) -> str:
    """The sha256 of an adapter's file, of several of each."""
    found = []
    for file, _ in adapter_files(path):
        with Checkpoint(file) as opened:
            found.append(opened.sha256())
    return ",".join(found)
