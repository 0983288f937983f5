"""The verb that carries a conversion on to other checkpoints: patch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from recast import console
from recast.cli_common import (
    Device,
    Far,
    Force,
    Json,
    Model,
    Recipe,
    Seed,
    Source,
    device_of,
    model_path,
)
from recast.cli_run import recipe_of, show_report
from recast.errors import Refused


def patch(
    model: Model,
    patch: Annotated[Path, typer.Argument(help="patch.safetensors of a related model's run.")],
    out: Annotated[
        Path, typer.Option(help="The checkpoint to write; its report goes into a folder beside it.")
    ],
    polish: Annotated[
        int, typer.Option(min=0, help="Steps of training after that; MODEL is the teacher.")
    ] = 0,
    images: Annotated[
        Path | None, typer.Option(help="With --polish: images with .txt captions.")
    ] = None,
    recipe: Recipe = "polish",
    seed: Seed = None,
    source: Source = None,
    device: Device = None,
    far: Far = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Convert a related checkpoint at once, with the patch of another one's conversion.

    Measures first how far MODEL is from the model that the patch was made from, then writes the
    checkpoint and a report of what was kept.

    Example: recast patch other.safetensors runs/flow/patch.safetensors --out other-flow.safetensors
    """
    from recast.adapter.patch import read_patch
    from recast.convert import Job, run

    if out.suffix != ".safetensors":
        raise Refused(f"--out {out}: give the file to write, such as {out}.safetensors.")
    if images and not polish:
        raise Refused("--images are for training, and nothing is trained: give --polish too.")
    objective = read_patch(patch).metadata["recast.objective"]
    job = Job(
        model_path(model), out.with_suffix(""), recipe_of(recipe, objective, polish or None, seed),
        images=images, source=source, device=device_of(device), force=force, start=patch,
        trains=polish > 0, far=far, file=out,
    )  # fmt: skip
    with console.stoppable() as stopped:
        console.follow(run(job, stopped))
    show_report(job.out, json)


VERBS = (patch,)
