"""The verbs that carry a conversion on to other checkpoints: patch, merge."""

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
from recast.show import show_file


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


def merge(
    a: Annotated[str, typer.Argument(help="A checkpoint; the result has its dtypes and markers.")],
    b: Annotated[str, typer.Argument(help="Another that predicts the same.")],
    out: Annotated[Path, typer.Option(help="The checkpoint to write.")],
    weight: Annotated[
        list[str] | None,
        typer.Option(
            help="B's share: 0.5 (the default), of a part or block as te=0, OUT08=1.0; may be "
            "given again, the last that fits counts."
        ),
    ] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Mix two checkpoints that predict the same, block by block.

    Example: recast merge flow.safetensors base-flow.safetensors --weight 0.3 --weight OUT08=0
    --out mixed.safetensors
    """
    from recast.adapter.merge import weights, write_merged
    from recast.layout import open_checkpoint

    shares = weights(weight or [])
    with open_checkpoint(model_path(a)) as one, open_checkpoint(model_path(b)) as other:
        sha256 = write_merged(one, other, shares, out, force=force)
    facts = {"file": str(out), "weights": shares.texts(), "sha256": sha256}
    console.emit(facts) if json else show_file(facts)


VERBS = (patch, merge)
