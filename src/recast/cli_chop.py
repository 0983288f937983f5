"""The verb that looks into an adapter block by block and cuts it: chop."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recast import console
from recast.cli_common import Device, Force, Json, Source, device_of, model_path
from recast.cli_lora import Of, _layout, _table, ranges
from recast.errors import Refused
from recast.events import amount
from recast.show import say

if TYPE_CHECKING:
    from recast.layout import Plan
    from recast.surgery.contents import Held, Row
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
    seed: Annotated[int, typer.Option(help="Seed of --explore, and of a preset's R and U.")] = 0,
    explore: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Paint with MODEL each block alone and left out, into a page (--out page.html).",
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="With --explore: what to paint; may be given again.")
    ] = None,
    kept: Annotated[
        float,
        typer.Option(help="With --explore: the share of the change that the suggestion keeps."),
    ] = 0.9,
    steps: Annotated[int, typer.Option(min=1, help="With --explore: steps of a picture.")] = 12,
    cfg: Annotated[float, typer.Option(help="With --explore: guidance scale; 1 is none.")] = 3.0,
    size: Annotated[
        str | None,
        typer.Option(help="With --explore: 1024 or 832x1216; the model's own otherwise."),
    ] = None,
    device: Device = None,
    source: Source = None,
    model: Of = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """List the blocks of an adapter, or write it with some of them dropped or scaled.

    A weight scales a block's change by exactly that; 0 leaves it out.

    With --explore it writes a page on which blocks are ticked by their pictures.

    Example: recast chop lora.safetensors --keep IN08,OUT00,OUT01 --out small.safetensors
    """
    if explore is not None:
        chosen = [name for name, given in {"--keep": keep, "--drop": drop, "--weights": weights,
                  "--vector": vector, "--model": model}.items() if given]  # fmt: skip
        if chosen:
            raise Refused(f"--explore paints all blocks of its own model: leave out {chosen[0]}.")
        asked = Asked(tuple(prompt or ()), seed, steps, kept, cfg, size)
        _explore(adapter, explore, out, asked, device, source, force=force, json=json)
        return
    from recast.adapter.formats import open_raw
    from recast.commit import refuse_target
    from recast.surgery.chop import chop as chop_file
    from recast.surgery.contents import energy, held
    from recast.surgery.weights import Weights, refuse_unknown

    layout = _layout(model)
    if out is not None and not adapter.is_dir():
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


@dataclass(frozen=True)
class Asked:
    """The options of --explore."""

    prompts: tuple[str, ...]
    seed: int
    steps: int
    kept: float
    scale: float
    size: str | None


def _explore(
    adapter: Path,
    model: str,
    out: Path | None,
    asked: Asked,
    device: str | None,
    source: str | None,
    *,
    force: bool,
    json: bool,
) -> None:
    """Paint every block alone and left out, and write the page."""
    from recast.adapter import read_adapter
    from recast.adapter.formats import open_raw
    from recast.commit import commit, refuse_target
    from recast.layout import detect, open_checkpoint
    from recast.layout.names import PART_NAMES
    from recast.model import open_model, usual_dtype
    from recast.painting import pixels
    from recast.surgery.contents import energy, held
    from recast.surgery.explore import Explored, Setting, explore, groups_of
    from recast.surgery.page import file_size, page

    if out is None or out.suffix not in (".html", ".htm"):
        raise Refused("--explore writes a page: give --out page.html.")
    if not asked.prompts:
        raise Refused("--explore paints: give --prompt, with what the adapter was trained on.")
    if not 0 < asked.kept <= 1:
        raise Refused(f"--kept {asked.kept:g} is no share: give a number up to 1, such as 0.9.")
    setting = Setting(
        asked.prompts, asked.seed, asked.steps, asked.scale, pixels(asked.size), asked.kept
    )
    refuse_target(out, force=force, sources=[adapter])
    ended: list[Explored] = []
    with open_checkpoint(model_path(model)) as checkpoint:
        layout = detect(checkpoint)
        with open_raw(adapter, layout) as raw:
            modules, plan = held(raw, adapter, layout)
            energies = {module.spot.lora: energy(adapter, module) for module in modules}
            where = device_of(device)
            opened = open_model(
                checkpoint, dtype=usual_dtype(where), device=where, parts=PART_NAMES,
                objective=source, lazily=True,
            )  # fmt: skip
            change = read_adapter(adapter, layout)
            console.follow(explore(opened, change, groups_of(modules), setting, ended))
            (seen,) = ended
            text = page(seen, plan, energies, adapter.name).encode()
            small = file_size(seen.groups, seen.chosen)
    commit(out, lambda file: file.write(text), size=len(text), force=force)
    assert seen.chosen_seen
    facts = {
        "page": str(out), "suggested": ",".join(seen.chosen), "likeness": seen.chosen_seen.likeness,
        "kept": seen.chosen_seen.kept, "bytes": small,
        "blocks": {g.name: {"alone": seen.alone[g.name].likeness,
                            "alone_kept": seen.alone[g.name].kept,
                            "without": seen.without[g.name].likeness,
                            "without_kept": seen.without[g.name].kept} for g in seen.groups},
    }  # fmt: skip
    if json:
        console.emit(facts)
        return
    say(f"suggested: {facts['suggested']} (keeps {100 * seen.chosen_seen.kept:.1f} %, "
        f"about {amount(small)})")  # fmt: skip
    say(f"Look at {out}")


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


VERBS = (chop,)
