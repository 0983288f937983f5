"""Adapters of smaller rank, exactly: each module's best part by a rule, or all modules' by a score.

One pass over the file gives the singular values of every module, without any product being formed
(see `thin`); `rules` and `scores` choose, and the chosen directions are made and written. What is
held is the result, in its own dtype. Modules of which nothing is left are not written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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
from recast.errors import Refused
from recast.layout import detect
from recast.surgery.guard import refuse_other_base, refuse_principal
from recast.surgery.norms import NORMS, norms
from recast.surgery.pieces import Piece, others, pieces, placed, spread
from recast.surgery.rules import Cut
from recast.surgery.scores import OF_BASE, Recipe
from recast.surgery.sizes import within_size
from recast.surgery.thin import overlaps

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
    with open_raw(source, layout) as raw:
        refuse_principal(source, raw.metadata)
        found = pieces(source, raw)
        if not found:
            raise Refused(f"{source} changes no matrix, so there is no rank to lower.")
        measured = _measure(source, found, [rule for _, rule in outs], base, any_base, cache, raw)
        made = [_write(source, raw, measured, out, rule, form or raw.form, dtype, force)
                for out, rule in outs]  # fmt: skip
    return made


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
    sites = {}
    tables: dict[str, dict[str, float]] = {}
    if base is not None:
        sites = placed(source, found, detect(base).sites("every"), str(base.path))
        if asked and not any_base:
            refuse_other_base(source, raw.metadata, base)
        tables = {name: norms(base, sites, name, cache) for name in NORMS if name in asked}

    def one(piece: Piece) -> Measured:
        ready = piece.measured()
        assert ready.singular is not None
        facts = {name: table[piece.lora] for name, table in tables.items()}
        overlap = None
        if "subspace" in asked:
            assert base is not None
            up, down, _ = piece.factors()
            weight = read_site(base, sites[piece.lora])
            overlap = overlaps(weight, up, down, ready.core())
        return Measured(ready, ready.singular, {**facts, "params": float(piece.numbers)}, overlap)

    return list(spread(one, found.values()))


def _write(
    source: Path,
    raw: Raw,
    measured: Sequence[Measured],
    out: Path,
    rule: Cut | Recipe,
    form: str,
    dtype: str | None,
    force: bool,
) -> Resized:
    loose = list(others(raw, {m.piece.lora: m.piece for m in measured}))
    rescale = 1.0 if isinstance(rule, Cut) else rule.rescale
    about = _about(raw.metadata, rule, measured)
    kept, lowest = _chosen(measured, rule, dtype, form, about, raw, loose)
    chosen = [(m, k) for m, k in zip(measured, kept, strict=True) if len(k)]
    if not chosen and not loose:
        raise Refused(
            f"nothing is left of {source} by {_text(rule)}: lower the threshold, or allow more."
        )
    whole = [m for m, k in chosen if _as_it_is(m.piece, k)]
    low = [(m.piece, k) for m, k in chosen if not _as_it_is(m.piece, k)]
    alpha = float(commonest(len(k) for _, k in low)) if low else 1.0

    def one(item: tuple[Piece, Tensor]) -> tuple[str, Pair]:
        piece, indices = item
        return piece.lora, _pair(piece, indices, alpha, rescale, dtype)

    full = {f"{m.piece.lora}.diff": m.piece.tensors["diff"] for m in whole}
    full |= {f"{lora}.{suffix}": raw.modules[lora][suffix] for lora, suffix in loose}
    full = {name: _cast(tensor, rescale, dtype) for name, tensor in full.items()}
    files = write_pairs(out, form, dict(spread(one, low)), full, about, raw.plan, source,
                        force=force)  # fmt: skip
    gone = tuple(m.piece.lora for m, k in zip(measured, kept, strict=True) if not len(k))
    ranks = tuple(len(indices) for _, indices in low)
    return Resized(tuple(files), len(chosen), gone, ranks, _error(measured, kept), lowest)


def _chosen(
    measured: Sequence[Measured],
    rule: Cut | Recipe,
    dtype: str | None,
    form: str,
    about: Mapping[str, str],
    raw: Raw,
    loose: Sequence[tuple[str, str]],
) -> tuple[list[Tensor], float | None]:
    """Indices of the directions that stay, by module; and the lowest score, of a recipe."""
    if isinstance(rule, Cut):
        counts = [rule.kept(m.singular, m.piece.short, conv=m.piece.conv) for m in measured]
        return [torch.arange(count) for count in counts], None
    scores = [rule.score(m.singular, m.facts, m.overlap) for m in measured]
    if rule.size is None:
        assert rule.thr is not None
        kept = [(score >= rule.thr).nonzero().flatten() for score in scores]
    else:
        orders = [rule.rank_by(s, m.piece.numbers) for s, m in zip(scores, measured, strict=True)]
        extra = sum(raw.modules[lora][suffix].nbytes for lora, suffix in loose)
        kept = within_size(
            [m.piece for m in measured], orders, rule.size, dtype, form, about, extra
        )
    seen = [float(score[k].min()) for score, k in zip(scores, kept, strict=True) if len(k)]
    return kept, min(seen, default=None)


def _as_it_is(piece: Piece, kept: Tensor) -> bool:
    """Whether a full change stays full: its factors would take as many numbers, or more."""
    size = piece.shape[0] * (piece.numbers - piece.shape[0])
    return piece.full and len(kept) * piece.numbers >= size


def _pair(piece: Piece, kept: Tensor, alpha: float, rescale: float, dtype: str | None) -> Pair:
    """The kept directions as a file holds them, rounded once."""
    up, down, _ = piece.factors()
    made = piece.core().factors(up, down, kept, rescale * len(kept) / alpha)
    form = DTYPES[dtype or piece.dtype]
    return Pair(made.up.to(form), made.down.to(form), alpha)


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
