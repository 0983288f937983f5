"""What a run leaves beside its adapter: the patch and the model, or a LoRA as trainers write it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from recast.checkpoint import Checkpoint
from recast.convert.exchange import with_vae
from recast.convert.folder import Folder
from recast.convert.networks import LORA, kind_of, write_lora_file
from recast.events import Event, Stage, Tick
from recast.recipe import dump_toml

if TYPE_CHECKING:
    from recast.adapter import Adapter
    from recast.convert import Job

MODEL, PATCH = "model.safetensors", "patch.safetensors"


def files_of(job: Job) -> tuple[str, ...]:
    """The files that a job ends in, in the order of writing.

    A plain LoRA is a change already; the model is written with it merged in where that is asked.
    """
    if kind_of(job.recipe) != "lora" or job.measure:
        return (PATCH, MODEL)
    return (LORA, MODEL) if job.recipe.network.merge else (LORA,)


def write_files(
    checkpoint: Checkpoint, folder: Folder, job: Job, source: str, objective: str
) -> Iterator[Event]:
    """Write those that are missing, from the original and what was trained."""
    from recast.adapter import read_adapter

    names = files_of(job)
    if all(folder.has(name) for name in names):
        return
    trained = read_adapter(folder.path("adapter.safetensors"))
    initial = None
    if folder.has("initial.safetensors"):
        initial = read_adapter(folder.path("initial.safetensors"))
    yield Stage("write", len(names), "files")
    for number, name in enumerate(names, 1):
        if folder.has(name):
            continue
        if name == LORA:
            write_lora_file(folder.path(LORA), folder.stamp(), checkpoint, job, trained)
        elif name == PATCH:
            write_patch(checkpoint, folder, job, source, objective, initial, trained)
        else:
            write_model(checkpoint, folder, job, objective, initial, trained)
        yield Tick(number)


def write_patch(
    checkpoint: Checkpoint,
    folder: Folder,
    job: Job,
    source: str,
    objective: str,
    initial: Adapter | None,
    trained: Adapter,
) -> None:
    """What training changed, with what it takes to try it on a relative."""
    from recast.adapter import write_adapter
    from recast.adapter.patch import patch_from, portable

    patch = patch_from(initial, trained)
    if source != objective and not job.recipe.data.vae:
        patch = portable(patch, checkpoint, source)
    about = {**folder.stamp(), "recast.objective": objective}
    write_adapter(folder.path(PATCH), patch, metadata=about, dtype="F16", force=True)


def write_model(
    checkpoint: Checkpoint,
    folder: Folder,
    job: Job,
    objective: str,
    initial: Adapter | None,
    trained: Adapter,
) -> None:
    """The whole checkpoint with what was trained."""
    from recast.adapter.rebuild import write_rebuilt
    from recast.convert import in_header

    write_rebuilt(
        with_vae(checkpoint, job.recipe), initial, trained, folder.path(MODEL),
        objective=objective,
        metadata={**folder.stamp(), "recast.recipe": dump_toml(in_header(job.recipe))},
        force=True,
    )  # fmt: skip
