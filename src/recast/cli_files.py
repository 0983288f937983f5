"""The verbs that work on files and pictures: inspect, sample."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recast import console
from recast.cli_common import Device, Force, Json, Model, Source, device_of, model_path
from recast.show import say, show_file

if TYPE_CHECKING:
    from recast.evaluate.values import NullLevel


def inspect(
    file: Annotated[str, typer.Argument(help="A checkpoint, folder, adapter or patch.")],
    null: Annotated[
        bool,
        typer.Option(
            "--null",
            help="Load the networks; measure how far the empty prompt is from zeroed conditioning.",
        ),
    ] = False,
    source: Source = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Say what a file is: architecture, parts, objective and the evidence for it, provenance.

    Only the header is read, unless --null is given.

    Example: recast inspect model.safetensors
    """
    from recast.inspection import describe

    facts = describe(model_path(file))
    if null:
        found = _null(model_path(file), device_of(device), source)
        if json:
            facts["null"] = [dataclasses.asdict(level) for level in found]
        else:
            facts["empty prompt against zeroed conditioning, by noise level"] = {
                f"{level.low:.1f} to {level.high:.1f}": f"{level.distance:.1%}" for level in found
            }
    console.emit(facts) if json else show_file(facts)


def _null(path: Path, device: str, source: str | None) -> tuple[NullLevel, ...]:
    """Measure the null conditions on pictures of a few prompts of the model's own kind."""
    from recast.evaluate.null import null_distance
    from recast.layout import open_checkpoint
    from recast.model import open_model, usual_dtype
    from recast.wishes import prompts_for

    with open_checkpoint(path) as checkpoint:
        texts = prompts_for(None, checkpoint)
    model = open_model(
        path, dtype=usual_dtype(device), device=device, parts=("unet", "te1", "te2"),
        objective=source, lazily=True,
    )  # fmt: skip
    return null_distance(model, texts[:: max(1, len(texts) // 4)][:4])


def sample(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")],
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be given again.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="A prompts file: one a line, --n --w --h --d --l --s options."),
    ] = None,
    negative: Annotated[str, typer.Option(help="Negative prompt.")] = "",
    seed: Annotated[
        int, typer.Option(help="Seed of the first picture; the next has the next.")
    ] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Sampler steps.")] = 25,
    sampler: Annotated[
        str, typer.Option(help="euler, ddim, heun, dpmpp_2m, euler_ancestral …")
    ] = "euler",
    cfg: Annotated[float, typer.Option(help="Guidance scale; 1 is none.")] = 3.0,
    shift: Annotated[
        float, typer.Option(help="Shift of the time grid; above 1 favours noise.")
    ] = 1.0,
    as_: Annotated[
        str | None, typer.Option("--as", help="Sample it as this objective, without training.")
    ] = None,
    size: Annotated[str | None, typer.Option(help="Pixels, as 1024 or 832x1216.")] = None,
    source: Source = None,
    device: Device = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Paint pictures with the sampler that fits what the checkpoint predicts.

    Example: recast sample pocket-xl --prompt "a big red star on dots at left" --out pictures
    """
    from recast.layout.names import PART_NAMES
    from recast.model import open_model, usual_dtype
    from recast.painting import Order, paint

    order = Order(
        prompts=tuple(prompt or ()), file=prompts, negative=negative, seed=seed, steps=steps,
        sampler=sampler, scale=cfg, shift=shift, objective=as_, size=size,
    )  # fmt: skip
    order.paths(out, force=force)  # refused before the model is read
    where = device_of(device)
    opened = open_model(
        model_path(model), dtype=usual_dtype(where), device=where, parts=PART_NAMES,
        objective=source, lazily=True,
    )  # fmt: skip
    written: list[Path] = []
    console.follow(paint(opened, out, order, written, force=force))
    if json:
        console.emit([str(path) for path in written])
    else:
        for path in written:
            say(str(path))


VERBS = (inspect, sample)
