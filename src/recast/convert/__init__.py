"""The whole run, top to bottom: a checkpoint in, a converted checkpoint and its measurement out.

    checkpoint -> material (images or dreams) -> training -> files -> report

Every artefact carries the run's digest, so the same command goes on at the first one missing.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from recast.checkpoint import Checkpoint
from recast.commit import commit, lock
from recast.convert.folder import Folder, Stopped, check_claim, claim
from recast.events import Event, Note, Stage, Tick
from recast.recipe import Recipe, dump_toml, load, override

if TYPE_CHECKING:
    from recast.adapter import Adapter
    from recast.data.folder import Example
    from recast.layout import Site
    from recast.model import Model

OUTPUTS = (
    "model.safetensors",
    "adapter.safetensors",
    "patch.safetensors",
    "initial.safetensors",
    "report.html",
    "report.json",
)


@dataclass(frozen=True)
class Job:
    """What to convert, where to, and how; `measure` off leaves the report out (plain training)."""

    model: Path
    out: Path
    recipe: Recipe
    images: Path | None = None
    source: str | None = None
    device: str = "cpu"
    skip_broken: bool = False
    force: bool = False
    measure: bool = True


def run(job: Job, stopped: Callable[[], int] = lambda: 0) -> Iterator[Event]:
    """Do the job, or what is missing of it; yields progress.

    Raises Refused for bad input and NoRoom before anything is written, Diverged when training is
    lost, Stopped once `stopped` returns a signal.
    """
    with Checkpoint(job.model) as checkpoint:
        source, objective, identity = yield from prepare(checkpoint, job)
        with lock(job.out):
            folder = claim(job.out, identity, outputs=OUTPUTS, force=job.force)
            write_recipe(folder, job.recipe)
            yield from train_stage(checkpoint, folder, job, source, objective, stopped)
            yield from file_stage(checkpoint, folder, job, objective)
            if not job.measure:
                return
            from recast.convert.measure import measure

            for event in measure(checkpoint, folder, job, source, objective):
                yield event
                if signal := stopped():
                    raise Stopped(
                        signal, "stopped while measuring; the same command measures anew."
                    )


def prepare(
    checkpoint: Checkpoint, job: Job
) -> Generator[Event, None, tuple[str, str, dict[str, object]]]:
    """Check everything that can be, writing nothing; returns source, target and identity."""
    from recast.convert import checks
    from recast.convert.material import examples_of, images_of, skips_broken

    checks.check_out(job.out)
    layout = checks.check_model(checkpoint, job.recipe)
    source, objective = checks.objectives(checkpoint, job)
    checks.check_recipe(job, checkpoint)
    images = images_of(job)
    found = examples_of(images, skip_broken=skips_broken(job)) if images else ()
    identity = identify(checkpoint, job, source, objective, found)
    resumes = check_claim(job.out, identity, outputs=OUTPUTS, force=job.force)
    if not resumes:
        checks.check_room(checkpoint, layout, job)
        if found:
            yield from checks.check_images(found, skip_broken=skips_broken(job))
    return source, objective, identity


def identify(
    checkpoint: Checkpoint, job: Job, source: str, objective: str, found: tuple[Example, ...]
) -> dict[str, object]:
    """What names this run: the model, the images, the recipe."""
    from recast.convert.material import dream_plan, images_digest

    dreamt = "" if found else f"dreamt {dream_plan(job, checkpoint, objective).digest('')}"
    recipe = job.recipe.model_dump(exclude={"about"})
    # see in_header
    recipe["train"].pop("checkpoint_every")
    return {
        "model": checkpoint.sha256(),
        "source": source,
        "objective": objective,
        "images": dreamt or images_digest(found),
        "recipe": recipe,
    }


def write_recipe(folder: Folder, recipe: Recipe) -> None:
    """Leave the resolved recipe in the run folder."""
    text = dump_toml(recipe).encode()
    if not folder.path("recipe.toml").exists():
        commit(folder.path("recipe.toml"), lambda file: file.write(text), size=len(text))


def in_header(recipe: Recipe) -> Recipe:
    """The recipe as a file states it: how often states were saved is not part of the result."""
    return override(recipe, checkpoint_every=load().train.checkpoint_every)


def train_stage(
    checkpoint: Checkpoint,
    folder: Folder,
    job: Job,
    source: str,
    objective: str,
    stopped: Callable[[], int],
) -> Iterator[Event]:
    """Write `adapter.safetensors` (and `initial.safetensors`, where the start is not zero)."""
    if folder.has("adapter.safetensors"):
        yield Note("The adapter is trained already.")
        return
    from recast.adapter import attach, write_adapter
    from recast.convert.material import gather
    from recast.convert.training import learn
    from recast.objective import OBJECTIVES

    target = OBJECTIVES[objective]
    material = yield from gather(checkpoint, folder, job, source, target, stopped)
    model = open_part(job, source, ("unet",))
    initial, sites = start(checkpoint, folder, model, job.recipe)
    attached = attach({"unet": model.unet}, initial, sites)
    try:
        trained = yield from learn(
            model, attached, material, job.recipe, target, folder.root, folder.digest, stopped
        )
    finally:
        attached.detach()
    about = {**folder.stamp(), "recast.objective": objective}
    write_adapter(folder.path("adapter.safetensors"), trained, metadata=about, force=True)


def open_part(job: Job, source: str, parts: tuple[str, ...]) -> Model:
    """The original's parts, in the precision of the recipe, on the job's device."""
    from recast.convert.training import precision
    from recast.model import open_model

    dtype = precision(job.recipe, job.device)
    return open_model(job.model, dtype=dtype, device=job.device, parts=parts, objective=source)


def start(
    checkpoint: Checkpoint, folder: Folder, model: Model, recipe: Recipe
) -> tuple[Adapter, list[Site]]:
    """The adapter before training, and its sites: principal factors, or zero changes.

    Factors are written to `initial.safetensors` and from then on read from there: a resumed run
    must start from the very bytes it started from.
    """
    from recast.adapter import read_adapter, write_adapter
    from recast.adapter.decompose import decompose, zeros_full

    sites = model.layout.sites(recipe.train.profile)
    if not recipe.train.rank:
        return zeros_full(checkpoint, sites), sites
    path = folder.path("initial.safetensors")
    if not folder.has(path.name):
        found = decompose(checkpoint, sites, recipe.train.rank)
        write_adapter(path, found, metadata=folder.stamp(), force=True)
    return read_adapter(path), sites


def file_stage(checkpoint: Checkpoint, folder: Folder, job: Job, objective: str) -> Iterator[Event]:
    """Write the patch and the converted checkpoint from the original and what was trained."""
    if folder.has("patch.safetensors") and folder.has("model.safetensors"):
        return
    from recast.adapter import read_adapter, write_adapter
    from recast.adapter.patch import patch_from
    from recast.adapter.rebuild import write_rebuilt

    trained = read_adapter(folder.path("adapter.safetensors"))
    initial = None
    if folder.has("initial.safetensors"):
        initial = read_adapter(folder.path("initial.safetensors"))
    yield Stage("write", 2, "files")
    if not folder.has("patch.safetensors"):
        patch = patch_from(initial, trained)
        about = {**folder.stamp(), "recast.objective": objective}
        write_adapter(
            folder.path("patch.safetensors"), patch, metadata=about, dtype="F16", force=True
        )
    yield Tick(1)
    if not folder.has("model.safetensors"):
        write_rebuilt(
            checkpoint, initial, trained, folder.path("model.safetensors"), objective=objective,
            metadata={**folder.stamp(), "recast.recipe": dump_toml(in_header(job.recipe))},
            force=True,
        )  # fmt: skip
    yield Tick(2)
