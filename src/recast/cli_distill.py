"""The verb distill: a student that learns from the original, under an assessor's eyes or not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from recast import console, processes
from recast.cli_common import Device, Force, Json, device_of, model_path
from recast.show import say, show_file


def distill(
    config: Annotated[
        Path,
        typer.Option(help="The run as TOML: run.model, run.out, times.toward, and what differs."),
    ],
    device: Device = None,
    check: Annotated[
        bool, typer.Option("--check", help="Print the resolved config and its hash; do nothing.")
    ] = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Distil a checkpoint into a student of another objective, with proof of every file.

    The student is a copy of the original; data are your images or the original's own dreams. The
    same command resumes, bit for bit; several processes share it. Presets: default, literal,
    pocket.

    Example: recast distill --config distil.toml
    """
    from recast.distillation.config import dump_toml, load
    from recast.distillation.sharing import widened
    from recast.distillation.upload import HUB

    how = load(config)
    if check:
        how = widened(how)
        if processes.first():
            say(f"{dump_toml(how)}\n# sha256 {how.digest()}")
        return
    if how.save.upload.startswith(HUB):
        os.environ["HF_HUB_OFFLINE"] = "0"  # before anything imports the hub's library
    from recast.distillation import Job, run
    from recast.distillation.folder import MODEL, REPORT, read_json

    job = Job(how, model_path(how.run.model), device_of(device), force)
    with console.stoppable() as stopped:
        console.follow(run(job, stopped))
    if not processes.first():
        return
    facts = {"model": str(job.out / MODEL), **dict(read_json(job.out / REPORT))}
    console.emit(facts) if json else show_file(facts)


VERBS = (distill,)
