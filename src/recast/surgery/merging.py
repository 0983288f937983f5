"""Merging checkpoints by a tree of steps: a piece at a time, from all files at once.

Rules that work value by value take pieces of tensors, the others whole ones. A tensor that no
network reads is the first model's, as are dtypes and markers. What each step makes of a tensor is
in `blend`. Adapters are added in fp32: W + sum_i w_i dW_i, rounded once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from recast.adapter.formats import FULL_SUFFIXES, open_raw
from recast.adapter.merge import OWN, RECIPE, in_chunks, shares_of
from recast.adapter.places import Place, read_site, refuse_residual, widened
from recast.adapter.rebuild import CONTENT_HASHES, _finite
from recast.checkpoint import DTYPES, Checkpoint, write_pieces
from recast.commit import refuse_target
from recast.errors import CheckFailed, Refused
from recast.layout import Site, detect, open_checkpoint
from recast.markers import read_objective
from recast.surgery import blend
from recast.surgery.blocks import spot
from recast.surgery.guard import refuse_principal
from recast.surgery.join import hashes
from recast.surgery.pieces import DORA, others, pieces, placed
from recast.surgery.recipes import PAIRS, Added, Step
from recast.surgery.stream import UNKNOWN, Source, ahead, piece_size, spans
from recast.surgery.sums import Term
from recast.surgery.weights import Weights, parse, refuse_unknown

Changes = dict[str, list[tuple[Site, Term]]]
Given = Mapping[Path, Tensor]  # a tensor of each file, or the same piece of it
POINTWISE = ("weighted", "difference")


@dataclass(frozen=True)
class Made:
    """A step whose files are open: shares of each model after the first by tensor, and changes."""

    step: Step
    models: tuple[Checkpoint | Made, ...]
    shares: tuple[Mapping[str, float], ...]
    changes: Changes

    @property
    def first(self) -> Checkpoint:
        """The checkpoint whose dtypes and names the result has."""
        model = self.models[0]
        return model.first if isinstance(model, Made) else model


def write_merge(step: Step, out: Path, *, force: bool = False) -> None:
    """Stream a merge to a file; the header has the recipe and the hashes of all parents.

    Raises Refused for files of different families, sizes or objectives, residuals, principal
    adapters and names that mean nothing.
    """
    with ExitStack() as files:
        opened = {path: files.enter_context(open_checkpoint(path)) for path in step.files}
        sources = [path for file in opened.values() for path in file.files]
        refuse_target(out, force=force, sources=[*sources, *filter(Path.is_file, _adapters(step))])
        made = _opened(step, opened, files)
        first = made.first
        about = {
            key: value for key, value in first.metadata.items()
            if key not in CONTENT_HASHES and key not in {f"recast.{name}" for name in OWN}
        }  # fmt: skip
        about |= {"recast.role": "checkpoint"}
        read = {path: files.enter_context(Source(file)) for path, file in opened.items()}
        known = {added: hashes(added) for added in _adapters(step)}
        for path, file in opened.items():  # those of single files are hashed while they are read
            known[path] = UNKNOWN if file.single else file.sha256()

        def last() -> dict[str, str]:
            known.update({path: source.sha256() for path, source in read.items()})
            return about | {RECIPE: json.dumps(_recipe(step, known))}

        specs = {key: (spec.dtype, spec.shape) for key, spec in first.specs.items()}
        begun = about | {RECIPE: json.dumps(_recipe(step, known))}
        pieces = _merged(made, read)
        write_pieces(out, specs, pieces, begun, last, force=force, sources=sources)


def _merged(made: Made, read: Mapping[Path, Source]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the result in the first file's order, in pieces; read and made ahead."""
    specs = made.first.specs
    size = piece_size(max((spec.nbytes for spec in specs.values()), default=0), len(read))

    def given() -> Iterator[tuple[str, Given]]:
        for key, spec in specs.items():
            wanted = dict.fromkeys(file.path for file in _needed(made, key))
            values = max(1, spec.numel if _whole(made, key) else size // DTYPES[spec.dtype][0])
            shape = spec.shape if _whole(made, key) else (-1,)
            for _, first, last in spans(key, spec.shape, values):
                yield key, {p: read[p].read(key, first, last).reshape(shape) for p in wanted}

    def results() -> Iterator[tuple[str, Tensor]]:
        for key, tensors in ahead(given()):
            yield key, value(made, key, tensors)

    return ahead(results())


def _needed(model: Checkpoint | Made, key: str) -> Iterator[Checkpoint]:
    """The files that a tensor of a merge is made from."""
    if isinstance(model, Checkpoint):
        yield model
        return
    yield from _needed(model.models[0], key)
    for other, share in zip(model.models[1:], model.shares, strict=True):
        if share.get(key):
            yield from _needed(other, key)


def _whole(model: Checkpoint | Made, key: str) -> bool:
    """Whether a tensor has to be whole for the work that is done to it."""
    if isinstance(model, Checkpoint):
        return model.single is None
    work = model.changes.get(key) or any(share.get(key) for share in model.shares)
    if work and model.step.how not in POINTWISE:
        return True
    return any(_whole(other, key) for other in model.models)


def value(model: Checkpoint | Made, key: str, given: Given) -> Tensor:
    """A tensor of a merge or a piece of it, from those of the files, which stay as they are."""
    if isinstance(model, Checkpoint):
        return given[model.path]
    mine = value(model.models[0], key, given)
    if model.changes.get(key):
        return _sound(mine, key, _changed(mine, model.changes[key]))
    numbers = [index for index, share in enumerate(model.shares) if share.get(key)]
    if not numbers:
        return mine
    others = [value(model.models[1 + index], key, given) for index in numbers]
    shares = [model.shares[index][key] for index in numbers]
    return _sound(mine, key, _blended(mine, model.step, key, others, numbers, shares))


def _blended(
    a: Tensor, step: Step, key: str, others: list[Tensor], numbers: list[int], shares: list[float]
) -> Tensor:
    """What a step makes of one tensor, in its dtype."""
    if step.how in POINTWISE:
        if step.how == "weighted" and len(others) == 1 and _alike(a, others[0]):
            return torch.lerp(a, others[0], shares[0])
        rule = blend.weighted if step.how == "weighted" else blend.difference
        return in_chunks(lambda wide, rest: rule(wide, rest, shares), a, others)
    wide = widened(a)
    rest = [x.to(wide.dtype) for x in others]
    seeds = [blend.seed_of(step.seed, number, key) for number in numbers]
    if step.how in PAIRS:
        result = (blend.slerp if step.how == "slerp" else blend.cosine)(wide, rest[0], shares[0])
    elif step.how == "ties":
        result = blend.ties(wide, rest, shares[0], step.density)
    elif step.how == "dare":
        result = blend.dare(wide, rest, shares, step.density, seeds)
    else:
        result = blend.dare_ties(wide, rest, shares[0], step.density, seeds)
    return result.to(a.dtype)


def _alike(a: Tensor, x: Tensor) -> bool:
    """Whether torch mixes two at once: through fp32, rounded once, the very bits of chunks."""
    return a.dtype == x.dtype and a.element_size() > 1


def _sound(tensor: Tensor, key: str, result: Tensor) -> Tensor:
    """The result; raises CheckFailed where work led out of the range of the dtype."""
    if not _finite(result) and _finite(tensor):
        raise CheckFailed(
            f"{key} leaves the range of {result.dtype} when merged: store the first model in bf16 "
            "or fp32."
        )
    return result


def _changed(tensor: Tensor, changes: list[tuple[Site, Term]]) -> Tensor:
    total = widened(tensor).clone() if tensor.element_size() > 2 else widened(tensor)
    for site, term in changes:
        view = Place("", site).view(total)
        change = term.dense()
        if not _finite(change):
            where = f"{term.piece.path}: " if term.piece else "an adapter's "
            raise Refused(f"{where}{site.lora} holds NaN or infinity; take an earlier save.")
        view += change.reshape(view.shape).to(total.dtype)
    return total.to(tensor.dtype)


def _opened(step: Step, opened: Mapping[Path, Checkpoint], files: ExitStack) -> Made:
    """A step with its files and plans, everything checked."""
    models = tuple(
        _opened(model, opened, files) if isinstance(model, Step) else opened[model]
        for model in step.models
    )
    firsts = [model.first if isinstance(model, Made) else model for model in models]
    if step.how == "lora":
        changes: Changes = {}
        for added in step.adapters:
            _collect(added, firsts[0], files, changes, mixed=isinstance(models[0], Made))
        return Made(step, models, (), changes)
    rules = step.weights if len(step.weights) == len(firsts) - 1 else step.weights * (
        len(firsts) - 1
    )  # fmt: skip
    shares = tuple(
        shares_of(firsts[0], other, rule) for other, rule in zip(firsts[1:], rules, strict=True)
    )
    return Made(step, models, shares, {})


def _collect(
    added: Added, base: Checkpoint, files: ExitStack, changes: Changes, *, mixed: bool
) -> None:
    """Add what an adapter changes, by the file's tensors; mixed: base is only part of the model."""
    refuse_residual(base)
    layout = detect(base)
    raw = files.enter_context(open_raw(added.path, layout, strangers=True))
    refuse_principal(added.path, raw.metadata)
    said, evidence = raw.metadata.get("recast.objective"), read_objective(base.specs, base.metadata)
    if said and evidence.objective != said:
        raise Refused(
            f"{added.path} is for models that predict {said}, and {base.path} predicts "
            f"{evidence.objective}: add it to one of its own kind."
        )
    weights = parse(added.weights) if added.weights else Weights()
    spots = {lora: spot(lora, layout.plan.unet.layers) for lora in raw.modules}
    refuse_unknown(weights, layout.plan, [found for found in spots.values() if found])
    everything = layout.sites("every")
    found = pieces(added.path, raw)
    known = {(site.lora, site.param): site for site in everything}

    def put(site: Site, term: Term) -> None:
        if term.weight:
            changes.setdefault(site.key, []).append((site, term))

    def weight(lora: str) -> float:
        where = spots[lora]
        return added.strength * (1.0 if where is None else weights.of(where))

    for lora, site in placed(added.path, found, everything, str(base.path)).items():
        piece = replace(found[lora], weight=partial(read_site, base, site))
        if mixed and DORA in piece.tensors:
            raise Refused(
                f"{added.path}: {lora} is DoRA, whose change depends on the weights it is made to: "
                "write the merge first, and add the adapter to that file."
            )
        put(site, Term(piece, weight(lora)))
    for lora, suffix in others(raw, found):
        place = known.get((lora, FULL_SUFFIXES[suffix]))
        tensor = raw.modules[lora][suffix]
        if place is None or tensor.numel() != torch.Size(place.shape).numel():
            raise Refused(f"{added.path}: {lora}.{suffix} has no place in {base.path}.")
        put(place, Term(None, weight(lora), tensor))


def _adapters(step: Step) -> Iterator[Path]:
    yield from (added.path for added in step.adapters)
    for model in step.models:
        if isinstance(model, Step):
            yield from _adapters(model)


def _recipe(step: Step, known: Mapping[Path, str]) -> dict[str, object]:
    """The tree with every file's hash."""
    models = [
        _recipe(model, known) if isinstance(model, Step)
        else {"file": model.name, "sha256": known[model]}
        for model in step.models
    ]  # fmt: skip
    found: dict[str, object] = {"how": step.how, "models": models}
    if step.weights:
        found["weights"] = [",".join(each.texts()) for each in step.weights]
    if step.density != 1:
        found["density"] = step.density
    if step.how.startswith("dare"):
        found["seed"] = step.seed
    if step.adapters:
        found["adapters"] = [
            {"file": one.path.name, "sha256": known[one.path], "strength": one.strength,
             **({"weights": one.weights} if one.weights else {})} for one in step.adapters
        ]  # fmt: skip
    return found
