"""The verbs that work on adapters: extract, export; and the table of split --dry-run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recast import console
from recast.cli_common import Force, Json, model_path
from recast.show import say

if TYPE_CHECKING:
    from recast.checkpoint import Checkpoint
    from recast.layout import Layout, Site

Of = Annotated[
    str | None,
    typer.Option("--model", help="The checkpoint it is for, where its names do not tell."),
]


def export(
    adapter: Annotated[Path, typer.Argument(help="An adapter file, or a PEFT folder.")],
    to: Annotated[str, typer.Option(help="kohya, peft, diffusers or comfy.")],
    out: Annotated[Path, typer.Option(help="The file to write; for peft a folder.")],
    model: Of = None,
    dtype: Annotated[
        str | None, typer.Option(help="fp32, fp16 or bf16; the file's own otherwise.")
    ] = None,
    pad: Annotated[
        bool, typer.Option("--pad", help="Fill all ranks up to the largest, for kohya's trainers.")
    ] = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Write an adapter in the names of another program; the numbers stay.

    Example: recast export lora.safetensors --to diffusers --out lora-diffusers.safetensors
    """
    from recast.adapter import export as export_file
    from recast.cli_files import dtype_of

    written = export_file(
        adapter,
        out,
        to,
        layout=_layout(model),
        dtype=dtype and dtype_of("--dtype", dtype),
        padded=pad,
        force=force,
    )
    if json:
        console.emit([str(path) for path in written])
    else:
        for path in written:
            say(str(path))


def _layout(model: str | None) -> Layout | None:
    from recast.checkpoint import Checkpoint
    from recast.layout import detect

    if model is None:
        return None
    with Checkpoint(model_path(model)) as checkpoint:
        return detect(checkpoint)


def show_forecast(
    checkpoint: Checkpoint,
    sites: list[Site],
    rules: list[str],
    adapter_dtype: str,
    resolution: int | None,
    batch: int,
    *,
    json: bool,
) -> None:
    """Print what a split would give each block, and the memory that training it would take."""
    from rich.table import Table

    from recast.adapter.forecast import forecast

    seen = forecast(
        checkpoint, sites, rules, adapter_dtype=adapter_dtype, resolution=resolution, batch=batch
    )
    memory = {name: round(getattr(seen.memory, name) / 1e9, 2) for name in MEMORY}
    if json:
        rows = [dataclasses.asdict(row) for row in (*seen.rows, seen.total)]
        console.emit({"blocks": rows, "adapter_bytes": seen.adapter_bytes, "memory_gb": memory})
        return
    table = Table("block", "layers", "rank", "energy", "parameters", box=None)
    for row in (*seen.rows, seen.total):
        held = f"{100 * row.energy:.1f} %"
        counts = (str(row.modules), ranges(row.ranks), held, f"{row.parameters:,}")
        table.add_row(row.block, *counts)
    console.OUT.print(table)
    say(f"adapter file   {seen.adapter_bytes / 1e6:.1f} MB")
    say("memory of one training step, estimated, in GB (bf16 trunk, fp32 adapter, AdamW):")
    say("    " + "   ".join(f"{name} {size}" for name, size in memory.items()))


MEMORY = ("trunk", "adapter", "activations", "total")


def ranges(numbers: Iterable[int]) -> str:
    """64, or 16 to 128."""
    low, high = min(found := list(numbers)), max(found)
    return str(low) if low == high else f"{low} to {high}"


VERBS = (export,)
