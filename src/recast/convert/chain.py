"""A conversion by way of other objectives: each leg a run of its own, one patch for the whole way.

    original --leg 1--> v-zsnr --leg 2--> flow          runs/x/1-v-zsnr, runs/x/2-flow
    model = original + (change of leg 1 + change of leg 2)

Every leg's teacher is the model that it starts from; the figures are against the original.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from recast.checkpoint import Checkpoint
from recast.convert.folder import Folder
from recast.events import Event, Note
from recast.recipe import override

if TYPE_CHECKING:
    from recast.adapter import Adapter
    from recast.convert import Job


def legs(job: Job, objective: str) -> list[Job]:
    """The legs' jobs; the last one is measured as the whole way only."""
    names = [*job.via, objective]
    found: list[Job] = []
    for number, name in enumerate(names, 1):
        leg = replace(
            job,
            out=job.out / f"{number}-{name}",
            recipe=override(job.recipe, objective=name),
            via=(),
            measure=job.measure and number < len(names),
        )
        if found:
            leg = replace(leg, model=found[-1].out / "model.safetensors", source=None)
        found.append(leg)
    return found


def legs_stage(
    checkpoint: Checkpoint,
    folder: Folder,
    job: Job,
    source: str,
    objective: str,
    stopped: Callable[[], int],
) -> Iterator[Event]:
    """Go every leg, or what is missing of it, and write the sum of their changes as the adapter."""
    if folder.has("adapter.safetensors"):
        yield Note("Every leg is trained already.")
        return
    from recast.adapter import write_adapter
    from recast.adapter.decompose import initial_metadata
    from recast.adapter.patch import combined
    from recast.convert import run

    chain = legs(job, objective)
    way = [source, *job.via, objective]
    for number, leg in enumerate(chain):
        yield Note(
            f"Leg {number + 1} of {len(chain)}: {way[number]} → {way[number + 1]} ({leg.out})"
        )
        yield from run(leg, stopped)
    whole = combined([change_of(leg.out) for leg in chain])
    about = {**initial_metadata(checkpoint, whole.role, None, None), **folder.stamp()}
    about["recast.objective"] = objective
    write_adapter(folder.path("adapter.safetensors"), whole, metadata=about, force=True)


def change_of(run: Path) -> Adapter:
    """What a run changed, in full precision."""
    from recast.adapter import patch_from, read_adapter

    initial = run / "initial.safetensors"
    start = read_adapter(initial) if initial.exists() else None
    return patch_from(start, read_adapter(run / "adapter.safetensors"))
