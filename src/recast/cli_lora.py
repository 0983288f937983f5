"""The verbs that work on adapters: extract, export; and the table of split --dry-run."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recast import console
from recast.cli_common import Force, Json, Model, Source, model_path
from recast.errors import Refused
from recast.events import Event, amount
from recast.show import say, show_file

if TYPE_CHECKING:
    from rich.table import Table

    from recast.adapter.forecast import Forecast
    from recast.checkpoint import Checkpoint
    from recast.layout import Layout, Site

Of = Annotated[
    str | None,
    typer.Option("--model", help="The checkpoint it is for, where its names do not tell."),
]


def extract(
    original: Model,
    out: Annotated[Path, typer.Option(help="The LoRA to write.")],
    trained: Annotated[
        Path | None, typer.Option(help="A trained adapter, with the --initial of its run.")
    ] = None,
    initial: Annotated[
        Path | None, typer.Option(help="The adapter before training; none for a change.")
    ] = None,
    tuned: Annotated[
        Path | None, typer.Option(help="Instead: another checkpoint, for what differs in it.")
    ] = None,
    rank: Annotated[
        list[str] | None,
        typer.Option(
            help="64, energy:0.99, error:0.01, score:-3.55, te=16 …; may be given again. "
            "Without: all of a trained adapter's change, rank 64 of --tuned."
        ),
    ] = None,
    te: Annotated[
        Path | None, typer.Option("--te", help="Take the text encoders from this adapter.")
    ] = None,
    parts: Annotated[str | None, typer.Option(help="Only these of unet,te,te1,te2.")] = None,
    profile: Annotated[
        str | None,
        typer.Option(help="With --tuned: which layers, as for split; all usual ones otherwise."),
    ] = None,
    method: Annotated[str, typer.Option(help="With --tuned: exact or fast.")] = "exact",
    dtype: Annotated[str, typer.Option(help="fp32, fp16 or bf16.")] = "fp16",
    force: Force = False,
    json: Json = False,
) -> None:
    """Write what training changed as a LoRA for the original and its relatives.

    Example: recast extract model.safetensors --tuned tuned.safetensors --rank energy:0.9:64
    --out lora.safetensors
    """
    from recast.adapter import extract_difference, extract_trained, read_adapter, write_adapter
    from recast.cli_common import dtype_of
    from recast.commit import refuse_target
    from recast.layout import detect, open_checkpoint
    from recast.lowrank import LowRank

    form, wanted = dtype_of("--dtype", dtype), parts.split(",") if parts else None
    if (trained is None) == (tuned is None):
        raise Refused("give either --trained, with its --initial, or --tuned.")
    with ExitStack() as files:
        base = files.enter_context(open_checkpoint(model_path(original)))
        refuse_target(out, force=force, sources=base.files)
        layout = detect(base)
        if tuned is not None:
            other = files.enter_context(open_checkpoint(tuned))
            sites = layout.sites(profile or _profile(layout, wanted))
            found = extract_difference(base, other, sites, rank or 64, method=method)
        else:
            given = (initial, trained, te)
            start, end, texts = (read_adapter(p, layout) if p else None for p in given)
            assert end is not None
            found = extract_trained(base, start, end, rank, texts=texts, parts=wanted)
        sha256 = write_adapter(out, found.adapter, dtype=form, force=force)
    entries = found.adapter.entries.values()
    facts: dict[str, Any] = {
        "file": str(out),
        "modules": len(entries),
        "ranks": ranges([entry.rank for entry in entries if isinstance(entry, LowRank)] or [0]),
        "relative_error": found.error,
        "left_out": list(found.left_out),
        "sha256": sha256,
    }
    if not json and len(found.left_out) > 3:
        first = ", ".join(found.left_out[:3])
        facts["left_out"] = f"{len(found.left_out)} tensors, first {first}"
    console.emit(facts) if json else show_file(facts)


def export(
    adapter: Annotated[
        Path,
        typer.Argument(help="An adapter file or PEFT folder; or a MODEL, file, folder or .ckpt."),
    ],
    to: Annotated[
        str,
        typer.Option(
            help="Adapters: kohya, peft, diffusers, comfy. Models: diffusers-folder, single-file."
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="The file to write; for peft and diffusers-folder a folder.")
    ],
    model: Of = None,
    dtype: Annotated[
        str | None, typer.Option(help="fp32, fp16 or bf16; the file's own otherwise.")
    ] = None,
    pad: Annotated[
        bool, typer.Option("--pad", help="Fill all ranks up to the largest, for kohya's trainers.")
    ] = False,
    source: Source = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Write an adapter or a model in the form of another program; the numbers stay.

    Example: recast export model.safetensors --to diffusers-folder --out model
    """
    from recast.adapter import export as export_file
    from recast.cli_common import dtype_of
    from recast.model import folder

    if to in folder.FORMATS:
        if model or pad:
            raise Refused(f"--to {to} is about a model: leave out --model and --pad.")
        form = dtype and dtype_of("--dtype", dtype)
        folder.export(model_path(str(adapter)), out, to, objective=source, dtype=form, force=force)
        written = [out]
    else:
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


def _profile(layout: Layout, parts: list[str] | None) -> str:
    """The layers that LoRA files usually hold, of the parts asked for."""
    from recast.adapter.ranks import PARTS

    odd = [part for part in parts or () if part not in PARTS]
    if odd:
        raise Refused(f"--parts: {odd[0]!r} is none of {', '.join(PARTS)}.")
    wanted = {one for part in parts or PARTS for one in PARTS[part]}
    names = {"unet": "lycoris-full", **{part: part for part in layout.text_parts}}
    return ",".join(name for part, name in names.items() if part in wanted)


def _layout(model: str | None) -> Layout | None:
    from recast.layout import detect, open_checkpoint

    if model is None:
        return None
    with open_checkpoint(model_path(model)) as checkpoint:
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
    from recast.adapter.forecast import forecast
    from recast.layout import detect
    from recast.model.load import preferred_size

    ended: list[Forecast] = []

    def steps() -> Generator[Event, None, None]:
        side = resolution or preferred_size(checkpoint, detect(checkpoint))
        seen = yield from forecast(
            checkpoint, sites, rules, adapter_dtype=adapter_dtype, batch=batch, resolution=side
        )
        ended.append(seen)

    console.follow(steps())
    seen = ended.pop()
    if json:
        rows = [dataclasses.asdict(row) for row in (*seen.rows, seen.total)]
        memory = {
            base: {name: getattr(of, name) for name in MEMORY} for base, of in seen.memory.items()
        }
        console.emit({
            "blocks": rows, "adapter_bytes": seen.adapter_bytes, "memory_bytes": memory,
            "resolution": seen.size[0], "batch": seen.size[1],
        })  # fmt: skip
        return
    _print_forecast(seen)


def _print_forecast(seen: Forecast) -> None:
    """A row for each block, and the memory on each base."""
    table = _table("block", "layers", "rank", "energy", "parameters", "adapter")
    for row in (*seen.rows, seen.total):
        size = seen.adapter_bytes * row.parameters / seen.total.parameters
        counts = (str(row.modules), ranges(row.ranks), f"{100 * row.energy:.1f} %")
        table.add_row(row.block, *counts, f"{row.parameters:,}", amount(size))
    console.OUT.print(table)
    side, pictures = seen.size
    say()
    say("energy is the share of the weights' squared norm that the factors hold.")
    say(f"GPU memory of one training step, estimated, {side} x {side} pixels, batch {pictures}:")
    table = _table("base", *MEMORY)
    for base, of in seen.memory.items():
        table.add_row(base, *(amount(getattr(of, name)) for name in MEMORY))
    console.OUT.print(table)
    say("trunk in bf16 (or quantised, --base), adapter with gradients and AdamW in fp32;")
    say("text encoders and VAE are not counted: what they give is cached before.")


MEMORY = ("trunk", "adapter", "activations", "total")


def _table(first: str, *numbers: str) -> Table:
    """A plain table: names to the left, numbers to the right."""
    from rich.table import Table

    table = Table(first, box=None, pad_edge=False)
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def ranges(numbers: Iterable[int]) -> str:
    """64, or 16 to 128."""
    low, high = min(found := list(numbers)), max(found)
    return str(low) if low == high else f"{low} to {high}"


VERBS = (extract, export)
