"""The verb dream: a model's own training pairs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recast import console
from recast.cli_common import Device, Json, Model, Source, device_of, model_path
from recast.errors import Refused
from recast.show import show_file

if TYPE_CHECKING:
    from recast.checkpoint import Checkpoint


def dream(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for the pairs; the same command resumes.")],
    to: Annotated[str, typer.Option(help="The objective whose path is walked.")] = "flow",
    pictures: Annotated[int, typer.Option(min=1, help="How many pictures to make.")] = 100,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="What of: one prompt a line, # begins a comment; a list that ships otherwise."
        ),
    ] = None,
    captions: Annotated[
        Path | None, typer.Option(help="What of: the captions of this folder's images.")
    ] = None,
    grammar: Annotated[
        int | None, typer.Option(min=1, help="What of: so many prompts put together at random.")
    ] = None,
    level: Annotated[
        int, typer.Option(min=0, max=5, help="How much is in one of those; 0: from 1 to 5 in turn.")
    ] = 0,
    shard: Annotated[
        str, typer.Option(help="Which part of those prompts, i/n: as many runs, each its own.")
    ] = "1/1",
    steps: Annotated[int, typer.Option(min=1, help="Sampler steps for each picture.")] = 25,
    solver: Annotated[str, typer.Option(help="euler, heun, dpmpp_2m, euler_ancestral …")] = "euler",
    cfg: Annotated[float, typer.Option(help="Guidance scale.")] = 3.0,
    seed: Annotated[int, typer.Option(help="Seed of noise and time grids.")] = 0,
    size: Annotated[
        int | None, typer.Option(help="Pixels of a side; the model's own otherwise.")
    ] = None,
    source: Source = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Let a checkpoint make its own training pairs: the states and velocities of its pictures.

    Example: recast dream pocket-xl --pictures 20 --out runs/dreams
    """
    from recast.dream import Plan
    from recast.dream import dream as dream_pairs
    from recast.layout import open_checkpoint
    from recast.model import open_model, usual_dtype
    from recast.objective import OBJECTIVES

    if to not in OBJECTIVES:
        raise Refused(f"no objective {to!r}: --to takes one of {', '.join(OBJECTIVES)}.")
    with open_checkpoint(model_path(model)) as file:
        texts = wishes_of(file, prompts, captions, grammar, level, seed, shard)
    where = device_of(device)
    opened = open_model(
        model_path(model), dtype=usual_dtype(where), device=where, parts=("unet", "te1", "te2"),
        objective=source, lazily=True,
    )  # fmt: skip
    plan = Plan(
        prompts=texts, pictures=pictures, steps=steps, guidance=cfg, seed=seed, size=size,
        objective=to, solver=solver,
    )  # fmt: skip
    with console.stoppable() as stopped:
        console.follow(dream_pairs(opened, out, plan, stopped=stopped))
        if signal := stopped():
            raise typer.Exit(128 + signal)
    taken = sum(path.stat().st_size for path in out.glob("pairs-*.safetensors"))
    facts = {
        "folder": str(out), "prompts": len(texts), "pictures": pictures,
        "states": pictures * steps, "bytes": taken,
    }  # fmt: skip
    console.emit(facts) if json else show_file(facts)


def wishes_of(
    checkpoint: Checkpoint,
    prompts: Path | None,
    captions: Path | None,
    grammar: int | None,
    level: int,
    seed: int,
    shard: str = "1/1",
) -> tuple[str, ...]:
    """What the command line says to dream of; refuses two answers, and a level of nothing."""
    from recast.wishes import captions_of, from_grammar, prompts_for

    if sum(given is not None for given in (prompts, captions, grammar)) > 1:
        raise Refused("--prompts, --captions and --grammar each say what to dream of: give one.")
    if level and grammar is None:
        raise Refused("--level says how much is in a prompt of --grammar: give that too.")
    part = part_of(shard)
    if part != (1, 1) and grammar is None:
        raise Refused("--shard takes a part of the prompts of --grammar: give that too.")
    if captions is not None:
        return captions_of(captions)
    if grammar is not None:
        return from_grammar(grammar, checkpoint, seed=seed, level=level, shard=part)
    return prompts_for(prompts, checkpoint)


def part_of(shard: str) -> tuple[int, int]:
    """(i, n) of "i/n"; refuses anything else."""
    which, _, of = shard.partition("/")
    if not (which.isdecimal() and of.isdecimal()):
        raise Refused(f"--shard is i/n, say 3/8, not {shard!r}.")
    return int(which), int(of)


VERBS = (dream,)
