"""The verbs of the assessor: assessor train, assessor report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from recast import console
from recast.cli_common import Device, Force, Json, Model, Seed, Source, device_of, model_path
from recast.show import say

app = typer.Typer(no_args_is_help=True)


@app.callback()
def assessor() -> None:
    """Train the probe that tells a teacher's times apart, and see what it can tell: train, report.

    Example: recast assessor train pocket-xl --bins 20 --out runs/assessor
    """


@app.command(no_args_is_help=True)
def train(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder of the run; the same command resumes it.")],
    images: Annotated[
        Path | None, typer.Option(help="Images with .txt captions; none: the model dreams its own.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="What to dream of, one a line; a list that ships otherwise.")
    ] = None,
    pictures: Annotated[
        int | None, typer.Option(min=0, help="How many pictures to dream. Default: 400.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Noised latents to learn from. Default: 20000.")
    ] = None,
    test: Annotated[
        int | None, typer.Option(min=1, help="Noised latents to measure on. Default: 10000.")
    ] = None,
    bins: Annotated[
        int | None,
        typer.Option(min=2, help="Time bins; 20 for small networks, whose times are hard to tell."),
    ] = None,
    patterns: Annotated[int | None, typer.Option(min=2, help="Patterns of a bin.")] = None,
    prototypes: Annotated[
        str | None, typer.Option(help="Prototypes of patterns: per_bin or shared.")
    ] = None,
    pattern_head: Annotated[
        str | None, typer.Option(help="How patterns are scored: subcentre, rose or centroid.")
    ] = None,
    t_signal: Annotated[
        str | None,
        typer.Option(
            help="clock: read the time the network is told; noise_level: tell it any, and read how "
            "noisy its input is."
        ),
    ] = None,
    where: Annotated[
        str | None, typer.Option(help="Take features pre_resample or post_block.")
    ] = None,
    pooling: Annotated[str | None, typer.Option(help="Pool by mean or mean_std.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of the fit.")] = None,
    batch: Annotated[int | None, typer.Option(min=2, help="Samples of a step.")] = None,
    seed: Seed = None,
    source: Source = None,
    device: Device = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Train an assessor on a teacher's features of noised latents, and measure it.

    Example: recast assessor train pocket-xl --bins 20 --out runs/assessor
    """
    from recast.assessing import Job, run
    from recast.assessing.latents import Source as Pictures
    from recast.assessing.settings import Settings, with_options

    how = with_options(
        Settings(), pictures=pictures, samples=samples, test=test, bins=bins, patterns=patterns,
        prototypes=prototypes, pattern_head=pattern_head, t_signal=t_signal, where=where,
        pooling=pooling, steps=steps, batch=batch, seed=seed,
    )  # fmt: skip
    job = Job(
        model_path(model), out, Pictures(images, prompts), how, source, device_of(device), force
    )
    with console.stoppable() as stopped:
        console.follow(run(job, stopped))
        if signal := stopped():
            raise typer.Exit(128 + signal)
    report(out, json)


@app.command(no_args_is_help=True)
def report(
    run: Annotated[Path, typer.Argument(help="Folder of an assessor's run.")], json: Json = False
) -> None:
    """Show what an assessor can tell, and its controls.

    Example: recast assessor report runs/assessor
    """
    from recast.assessing.record import load, page

    loaded = load(run)
    if json:
        console.emit(loaded)
        return
    for line in page(loaded):
        say(line)
