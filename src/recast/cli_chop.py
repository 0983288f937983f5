"""The verbs that look into an adapter block by block: chop, track."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recast import console
from recast.cli_common import Force, Json, model_path
from recast.cli_lora import Of, _layout, _table, ranges
from recast.errors import Refused
from recast.events import amount
from recast.show import say

if TYPE_CHECKING:
    from recast.layout import Plan
    from recast.surgery.contents import Held, Row
    from recast.surgery.track import Track
    from recast.surgery.weights import Weights


def chop(
    adapter: Annotated[Path, typer.Argument(help="An adapter file of any format, or PEFT folder.")],
    out: Annotated[
        Path | None, typer.Option(help="The file to write; without it, the blocks are listed.")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="OUT*=0.5,TE1=0,OUT01.attn2=1: the last name that fits counts."),
    ] = None,
    keep: Annotated[str | None, typer.Option(help="Only these, such as IN08,OUT01,TE2.")] = None,
    drop: Annotated[str | None, typer.Option(help="All but these.")] = None,
    vector: Annotated[
        str | None,
        typer.Option(help="A vector of 12, 17, 20, 21, 26 or 27 numbers, or an Inspire preset."),
    ] = None,
    a: Annotated[float, typer.Option("--a", help="What A means in a preset; half of it a.")] = 4.0,
    b: Annotated[float, typer.Option("--b", help="What B means in a preset; half of it b.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of a preset's R and U.")] = 0,
    model: Of = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """List the blocks of an adapter, or write it with some of them dropped or scaled.

    A weight scales a block's change by exactly that; 0 leaves it out.

    Example: recast chop lora.safetensors --keep IN08,OUT00,OUT01 --out small.safetensors
    """
    from recast.adapter.formats import open_raw
    from recast.commit import refuse_target
    from recast.surgery.chop import chop as chop_file
    from recast.surgery.contents import energy, held
    from recast.surgery.weights import Weights, refuse_unknown

    layout = _layout(model)
    if out is not None:
        refuse_target(out, force=force, sources=[adapter])
    with open_raw(adapter, layout, strangers=True) as raw:
        modules, plan = held(raw, adapter, layout)
        wanted = _weights(keep, vector, weights, drop, plan, modules, (a, b, seed))
        refuse_unknown(wanted, plan, [module.spot for module in modules])
        energies = {module.spot.lora: energy(adapter, module) for module in modules}
    facts: dict[str, Any] = {}
    if out is not None:
        done = chop_file(adapter, out, wanted, layout=layout, force=force)
        facts = {"files": [str(path) for path in done.files], "bytes": done.bytes,
                 "kept": done.kept, "dropped": done.dropped}  # fmt: skip
    elif not wanted.rules:  # what is there, and what is not
        there = {module.spot.block for module in modules}
        wanted = Weights((("*", 0.0), *((block, 1.0) for block in sorted(there))))
        facts = {}
    _show(facts, modules, energies, wanted, plan, json=json)


def _weights(
    keep: str | None,
    vector: str | None,
    weights: str | None,
    drop: str | None,
    plan: Plan,
    modules: list[Held],
    letters: tuple[float, float, int],
) -> Weights:
    """Weights from the command line: --keep or --vector first, then --weights, then --drop."""
    from recast.surgery.vectors import read_vector
    from recast.surgery.weights import Weights, only, parse, without

    if keep and vector:
        raise Refused("--keep and --vector each say what stays: give one of them.")
    found = Weights()
    if keep:
        found = only(keep)
    if vector:
        a, b, seed = letters
        spots = [module.spot for module in modules]
        found = read_vector(vector, plan, spots, a=a, b=b, seed=seed)
    if weights:
        found += parse(weights)
    return found + without(drop) if drop else found


def _show(
    facts: dict[str, Any],
    modules: list[Held],
    energies: dict[str, float | None],
    weights: Weights,
    plan: Plan,
    *,
    json: bool,
) -> None:
    """The blocks with their weights, the vectors that say the same, and what was written."""
    import dataclasses

    from recast.surgery.contents import rows
    from recast.surgery.vectors import DIALECTS, write_vectors

    spots = [module.spot for module in modules]
    vectors = write_vectors(weights, plan, spots)
    of: dict[str, set[float]] = {}
    for spot in spots:
        for block in (spot.block, spot.part.upper(), "all"):
            of.setdefault(block, set()).add(weights.of(spot))
    if json:
        listed = [
            dataclasses.asdict(row) | {"weights": sorted(of[row.block])}
            for row in rows(modules, energies)
        ]
        console.emit({
            **facts, "family": plan.family, "weights": str(weights), "blocks": listed,
            "vectors": {str(n): text for n, text in vectors.items()},
        })  # fmt: skip
        return
    table = _table("block", "modules", "rank", "parameters", "bytes", "energy", "weight")
    for row in rows(modules, energies, whole_texts=True):
        table.add_row(*_cells(row, of[row.block]))
    console.OUT.print(table)
    say()
    say("energy is the share of the squared norm of the whole change.")
    for length, text in vectors.items():
        labels = DIALECTS[length].labels
        say(f"{length:2} ({labels[0]}, {labels[1]} … {labels[-1]}): {text}")
    for path in facts.get("files", ()):
        say(f"{path}  ({facts['kept']} modules kept, {facts['dropped']} dropped)")


def _cells(row: Row, weights: set[float]) -> tuple[str, ...]:
    share = "–" if row.energy is None else f"{100 * row.energy:.1f} %"
    weight = " ".join(f"{w:g}" for w in sorted(weights)) if len(weights) < 4 else "several"
    rank = ranges(row.ranks) if row.ranks else "–"
    counts = (row.block, str(row.modules), rank, f"{row.parameters:,}")
    return (*counts, amount(row.bytes), share, weight)


def track(
    run: Annotated[
        list[Path], typer.Argument(help="A run's folder with saved steps, or the files in order.")
    ],
    out: Annotated[Path | None, typer.Option(help="The picture to write, a .png.")] = None,
    initial: Annotated[
        Path | None, typer.Option(help="The adapter training began with; found in a run's folder.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Its checkpoint: shows the change relative to the weights.")
    ] = None,
    each: Annotated[
        bool, typer.Option("--each", help="Since the saved step before, not since the start.")
    ] = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Show how far weights moved over the saved steps of a run, per block and module.

    Example: recast track runs/lora --out change.png
    """
    from contextlib import ExitStack

    from recast.commit import commit, refuse_target
    from recast.evaluate.track import by_block, change_png
    from recast.layout import open_checkpoint
    from recast.surgery.track import saved_steps
    from recast.surgery.track import track as measure

    if out is not None:
        refuse_target(out, force=force)
    saved, found = saved_steps(run)
    with ExitStack() as files:
        base = files.enter_context(open_checkpoint(model_path(model))) if model else None
        seen = measure(saved, initial=initial or found, model=base, each=each)
    steps = range(len(seen.steps))
    rows = [by_block(seen.squares(k)) for k in steps]
    blocks = {block: [row[block] for row in rows] for block in rows[0]}
    if out is not None:
        title = "Change between saved steps" if each else "Change since the start"
        data = change_png(seen.steps, blocks, title=f"{title} (Frobenius norm)")
        commit(out, lambda file: file.write(data), size=len(data), force=force)
    if json:
        console.emit({
            "steps": seen.steps, "blocks": blocks, "modules": seen.norms,
            "relative": _relative(seen), "picture": out and str(out),
        })  # fmt: skip
        return
    _show_track(seen, blocks)
    if out is not None:
        say(str(out))


def _relative(seen: Track) -> dict[str, float]:
    """The last norm over that of the base's weights, by block; empty without a base."""
    from recast.evaluate.track import by_block

    if not seen.base:
        return {}
    weights = by_block((seen.blocks[lora], norm**2) for lora, norm in seen.base.items())
    return {block: norm / weights[block] for block, norm in by_block(seen.squares(-1)).items()
            if weights.get(block)}  # fmt: skip


def _show_track(seen: Track, blocks: dict[str, list[float]]) -> None:
    """Up to seven steps by block, text encoders as one, and the modules that moved furthest."""
    count = len(seen.steps)
    shown = sorted({round(k * (count - 1) / 6) for k in range(7)})
    relative = _relative(seen)
    table = _table(
        "block", *(str(seen.steps[k]) for k in shown), *(["of weights"] * bool(relative))
    )
    texts: dict[str, list[list[float]]] = {}
    for block, norms in blocks.items():
        texts.setdefault(block.partition(".")[0], []).append(norms)
    for block, group in texts.items():
        cells = [f"{math.hypot(*(norms[k] for norms in group)):.4g}" for k in shown]
        share = relative.get(block)
        table.add_row(block, *cells, *([f"{100 * share:.2g} %"] if share else []))
    console.OUT.print(table)
    say()
    most = sorted(seen.norms, key=lambda lora: -seen.norms[lora][-1])[:5]
    for lora in most:
        say(f"{seen.norms[lora][-1]:.4g}  {seen.blocks[lora]:<8} {lora}")


VERBS = (chop, track)
