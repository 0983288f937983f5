"""Adapters of smaller rank, exactly: each module's best part by a rule, or all modules' by a score.

One pass over the file gives the singular values of every module, without any product being formed
(see `thin`); `rules` and `scores` choose, and the chosen directions are made and written. What is
held is the result, in its own dtype. Modules of which nothing is left are not written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from recast.adapter.export import write_pairs
from recast.adapter.file import DTYPES
from recast.adapter.formats import Raw, open_raw
from recast.adapter.pairs import Pair, commonest
from recast.adapter.places import read_site, refuse_residual
from recast.adapter.rebuild import CONTENT_HASHES
from recast.checkpoint import Checkpoint
from recast.commit import refuse_target
from recast.errors import Refused
from recast.layout import detect
from recast.layout.peft import CONFIG
from recast.surgery.blocks import architecture
from recast.surgery.guard import refuse_other_base, refuse_principal
from recast.surgery.norms import NORMS, norms
from recast.surgery.pieces import DORA, Piece, others, pieces, placed, spread
from recast.surgery.rules import Cut
from recast.surgery.scores import OF_BASE, Recipe
from recast.surgery.sizes import within_size
from recast.surgery.thin import overlaps

TENSORS = ("kohya", "comfy")  # formats with one alpha for a file; the others have scale 1
OWN = ("recast.alpha", "recast.rank", "recast.energy", "recast.rank_rule", "recast.resize")


@dataclass(frozen=True)
class Resized:
    """What was written, and how far it is from the whole change (Frobenius, before rounding).

    lowest: the lowest score that was kept, of a recipe.
    """

    files: tuple[Path, ...]
    modules: int
    vanished: tuple[str, ...]
    ranks: tuple[int, ...]
    error: float
    lowest: float | None = None


@dataclass(frozen=True)
class Job:
    """An open adapter, its modules measured, and how results are written.

    loose: module and suffix of norms and biases, which have no rank.
    """

    source: Path
    raw: Raw
    measured: Sequence[Measured]
    loose: Sequence[tuple[str, str]]
    form: str
    dtype: str | None


@dataclass(frozen=True)
class Choice:
    """Indices of the directions that stay, by module, the header, and the lowest score."""

    kept: Sequence[Tensor]
    about: Mapping[str, str]
    rescale: float
    lowest: float | None


@dataclass(frozen=True)
class Measured:
    """A module, its singular values known, and what recipes ask of the base about it."""

    piece: Piece
    singular: Tensor
    facts: Mapping[str, float]
    overlap: Tensor | None


def resize(
    source: Path,
    outs: Sequence[tuple[Path, Cut | Recipe]],
    *,
    base: Checkpoint | None = None,
    form: str | None = None,
    dtype: str | None = None,
    any_base: bool = False,
    cache: Path | None = None,
    force: bool = False,
) -> list[Resized]:
    """Write a smaller adapter for each rule, in the source's own form and dtype unless given.

    base: the checkpoint that scores are held against; without one, recipes that need it are
    refused. any_base: even where the adapter names another. Raises Refused for principal adapters
    and empty results.
    """
    layout = None
    if base is not None:
        refuse_residual(base)
        layout = detect(base)
    with open_raw(source, layout, strangers=True) as raw:
        refuse_principal(source, raw.metadata)
        if raw.plan is None:
            architecture(raw.modules, raw.metadata, str(source))
        shape = form or raw.form
        for out, _ in outs:
            target = out / CONFIG if shape == "peft" else out
            refuse_target(target, force=force, sources=[] if source.is_dir() else [source])
        found = pieces(source, raw)
        if not found:
            raise Refused(f"{source} changes no matrix, so there is no rank to lower.")
        measured = _measure(source, found, [rule for _, rule in outs], base, any_base, cache, raw)
        job = Job(source, raw, measured, list(others(raw, found)), shape, dtype)
        choices = [(out, _choose(job, rule)) for out, rule in outs]  # all, before any is written
        return [_write(job, choice, out, force) for out, choice in choices]


def _measure(
    source: Path,
    found: Mapping[str, Piece],
    rules: Iterable[Cut | Recipe],
    base: Checkpoint | None,
    any_base: bool,
    cache: Path | None,
    raw: Raw,
) -> list[Measured]:
    """Singular values of every piece, and the facts about the base that any rule asks for."""
    asked = {
        term for rule in rules if isinstance(rule, Recipe) for term in OF_BASE if rule.uses(term)
    }
    if asked and base is None:
        raise Refused(
            f"{', '.join(sorted(asked))} of the recipe is about the checkpoint: give it with "
            "--model."
        )
    dora = [lora for lora, piece in found.items() if DORA in piece.tensors]
    if dora and base is None:
        raise Refused(
            f"{len(dora)} modules of {source} are DoRA, first {dora[0]}, whose change depends on "
            "the weights it is made to: give the checkpoint with --model."
        )
    sites = {}
    tables: dict[str, dict[str, float]] = {}
    if base is not None:
        sites = placed(source, found, detect(base).sites("every"), str(base.path))
        if (asked or dora) and not any_base:
            refuse_other_base(source, raw.metadata, base)
        tables = {name: norms(base, sites, name, cache) for name in NORMS if name in asked}

    def one(piece: Piece) -> Measured:
        if base is not None:
            piece = replace(piece, weight=partial(read_site, base, sites[piece.lora]))
        ready = piece.measured()
        assert ready.singular is not None
        facts = {name: table[piece.lora] for name, table in tables.items()}
        overlap = None
        if "subspace" in asked:
            assert piece.weight is not None
            up, down, _ = piece.factors()
            overlap = overlaps(piece.weight(), up, down, ready.core())
        return Measured(ready, ready.singular, {**facts, "params": float(piece.numbers)}, overlap)

    return list(spread(one, found.values()))


def _choose(job: Job, rule: Cut | Recipe) -> Choice:
    """What a rule leaves; raises Refused where that is nothing."""
    about = _about(job.raw.metadata, rule, job.measured)
    lowest = None
    if isinstance(rule, Cut):
        counts = [rule.kept(m.singular, m.piece.short, conv=m.piece.conv) for m in job.measured]
        kept = [torch.arange(count) for count in counts]
    else:
        scores = [rule.score(m.singular, m.facts, m.overlap) for m in job.measured]
        kept = _by_score(job, rule, scores, about)
        seen = [float(score[k].min()) for score, k in zip(scores, kept, strict=True) if len(k)]
        lowest = min(seen, default=None)
    if not job.loose and not any(len(indices) for indices in kept):
        raise Refused(
            f"nothing is left of {job.source} by {_text(rule)}: lower the threshold, or allow more."
        )
    return Choice(kept, about, 1.0 if isinstance(rule, Cut) else rule.rescale, lowest)


def _by_score(
    job: Job, recipe: Recipe, scores: Sequence[Tensor], about: Mapping[str, str]
) -> list[Tensor]:
    """Indices of the directions that score enough, or that fit best into the size."""
    if recipe.size is None:
        assert recipe.thr is not None
        return [(score >= recipe.thr).nonzero().flatten() for score in scores]
    found = [m.piece for m in job.measured]
    orders = [recipe.rank_by(s, piece.numbers) for s, piece in zip(scores, found, strict=True)]
    extra = sum(job.raw.modules[lora][suffix].nbytes for lora, suffix in job.loose)
    return within_size(found, orders, recipe.size, job.dtype, job.form, about, extra)


def _write(job: Job, choice: Choice, out: Path, force: bool) -> Resized:
    both = list(zip((m.piece for m in job.measured), choice.kept, strict=True))
    chosen = [(piece, kept) for piece, kept in both if len(kept)]
    whole = [piece for piece, kept in chosen if _as_it_is(piece, kept)]
    low = [(piece, kept) for piece, kept in chosen if not _as_it_is(piece, kept)]
    alpha = float(commonest(len(kept) for _, kept in low)) if low else 1.0

    def one(item: tuple[Piece, Tensor]) -> tuple[str, Pair]:
        piece, kept = item
        mine = alpha if job.form in TENSORS else float(len(kept))
        return piece.lora, _pair(piece, kept, mine, choice.rescale, job.dtype)

    full = {f"{piece.lora}.diff": piece.delta().to(DTYPES[piece.dtype]) for piece in whole}
    full |= {f"{lora}.{suffix}": job.raw.modules[lora][suffix] for lora, suffix in job.loose}
    full = {name: _cast(tensor, choice.rescale, job.dtype) for name, tensor in full.items()}
    files = write_pairs(out, job.form, dict(spread(one, low)), full, choice.about, job.raw.plan,
                        job.source, force=force)  # fmt: skip
    gone = tuple(piece.lora for piece, kept in both if not len(kept))
    ranks = tuple(len(kept) for _, kept in low)
    error = _error(job.measured, choice.kept)
    return Resized(tuple(files), len(chosen), gone, ranks, error, choice.lowest)


def _as_it_is(piece: Piece, kept: Tensor) -> bool:
    """Whether a full change stays full: its factors would take as many numbers, or more."""
    size = piece.shape[0] * (piece.numbers - piece.shape[0])
    return piece.full and len(kept) * piece.numbers >= size


def _pair(piece: Piece, kept: Tensor, alpha: float, rescale: float, dtype: str | None) -> Pair:
    """The kept directions as a file holds them, rounded once."""
    up, down, _ = piece.factors()
    made = piece.core().factors(up, down, kept, rescale * len(kept) / alpha)
    form = DTYPES[dtype or piece.dtype]
    found = Pair(made.up.to(form), made.down.to(form), alpha)
    if not (torch.isfinite(found.up).all() and torch.isfinite(found.down).all()):
        raise Refused(
            f"{piece.path}: {piece.lora} leaves the range of its dtype; write it with --dtype fp32."
        )
    return found


def _cast(tensor: Tensor, rescale: float, dtype: str | None) -> Tensor:
    wide = tensor if rescale == 1 else (tensor.double() * rescale).to(tensor.dtype)
    return wide if dtype is None else wide.to(DTYPES[dtype])


def _error(measured: Sequence[Measured], kept: Sequence[Tensor]) -> float:
    whole = sum(float(m.singular.square().sum()) for m in measured)
    held = sum(float(m.singular[k].square().sum()) for m, k in zip(measured, kept, strict=True))
    return max(0.0, 1 - held / whole) ** 0.5 if whole else 0.0


def _about(
    metadata: Mapping[str, str], rule: Cut | Recipe, measured: Sequence[Measured]
) -> dict[str, str]:
    """The header that stays true, and what was done; hashes and dimensions are made on writing."""
    kept = {k: v for k, v in metadata.items() if k not in (*OWN, *CONTENT_HASHES)}
    low = any(not m.piece.full for m in measured)
    kept.setdefault("recast.role", "delta" if low else "full")
    return kept | {"recast.resize": _text(rule)}


def _text(rule: Cut | Recipe) -> str:
    if isinstance(rule, Recipe):
        return rule.text
    named = {"rank": rule.most, "conv_rank": rule.most_conv, rule.rule: rule.value}
    said = ",".join(f"{name}={value:g}" for name, value in named.items() if name and value)
    return f"{said},like_kohya" if rule.like_kohya else said
