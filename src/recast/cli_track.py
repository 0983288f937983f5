"""The verb that looks at an adapter over the steps of its training: track."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recast import console
from recast.cli_common import Force, Json, model_path
from recast.cli_lora import _table
from recast.show import say

if TYPE_CHECKING:
    from recast.surgery.track import Track


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
    weights: dict[str, float] = {}
    for lora, norm in seen.base.items():
        head = seen.blocks[lora].partition(".")[0]
        weights[head] = math.hypot(weights.get(head, 0.0), norm)
    table = _table("block", *(str(seen.steps[k]) for k in shown), *(["of weights"] * bool(weights)))
    texts: dict[str, list[list[float]]] = {}
    for block, norms in blocks.items():
        texts.setdefault(block.partition(".")[0], []).append(norms)
    for block, group in texts.items():
        cells = [f"{math.hypot(*(norms[k] for norms in group)):.4g}" for k in shown]
        if block in weights:
            last = math.hypot(*(norms[-1] for norms in group))
            cells.append(f"{100 * last / weights[block]:.2g} %")
        table.add_row(block, *cells)
    console.OUT.print(table)
    say()
    most = sorted(seen.norms, key=lambda lora: -seen.norms[lora][-1])[:5]
    for lora in most:
        say(f"{seen.norms[lora][-1]:.4g}  {seen.blocks[lora]:<8} {lora}")


VERBS = (track,)
