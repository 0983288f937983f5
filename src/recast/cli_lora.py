"""The verbs that work on adapters: export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recast import console
from recast.cli_common import Force, Json, model_path
from recast.cli_files import dtype_of
from recast.show import say

if TYPE_CHECKING:
    from recast.layout import Layout

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


VERBS = (export,)
