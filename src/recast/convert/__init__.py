"""The whole run, top to bottom: a checkpoint in, a converted checkpoint and its measurement out.

    checkpoint -> material (images or dreams) -> training -> files -> report

Every artefact carries the run's digest, so the same command goes on at the first one missing.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from recast import processes
from recast.checkpoint import Checkpoint
from recast.commit import commit, lock
from recast.convert.folder import Folder, check_claim, claim
from recast.errors import Stopped
from recast.events import Event, Note
from recast.layout import detect, open_checkpoint
from recast.recipe import Recipe, dump_toml, load, override

if TYPE_CHECKING:
    from recast.adapter import Adapter
    from recast.data.folder import Example
    from recast.model import Model
    from recast.quantise import Quantiser

MODEL = "model.safetensors"
OUTPUTS = (
    MODEL,
    "adapter.safetensors",
    "lora.safetensors",
    "patch.safetensors",
    "initial.safetensors",
    "start.safetensors",
    "report.html",
    "report.json",
)


@dataclass(frozen=True)
class Job:
    """What to convert, where to, and how; `measure` off leaves the report out (plain training).

    via: objectives on the way, each a run of its own. start: a patch to begin with, `trains` off
    adds it and trains nothing, `far` takes it for any model. file: where the model is written, if
    not into `out`. pairs: a folder of `recast dream` in place of the run's own dreams.
    """

    model: Path
    out: Path
    recipe: Recipe
    images: Path | None = None
    source: str | None = None
    device: str = "cpu"
    skip_broken: bool = False
    force: bool = False
    measure: bool = True
    via: tuple[str, ...] = ()
    start: Path | None = None
    trains: bool = True
    far: bool = False
    file: Path | None = None
    pairs: Path | None = None


def run(job: Job, stopped: Callable[[], int] = lambda: 0) -> Iterator[Event]:
    """Do the job, or what is missing of it; yields progress.

    Raises Refused for bad input and NoRoom before anything is written, Diverged when training is
    lost, Stopped once `stopped` returns a signal.
    """
    from recast.convert.assist import assist, widened
    from recast.convert.files import write_files
    from recast.convert.found import with_dataset

    processes.join()
    job, remarks = with_dataset(job)
    job, stopped = widened(job), processes.passed_on(stopped)
    if not processes.first():
        yield from assist(job, stopped)
        return
    yield from map(Note, remarks)
    with open_checkpoint(job.model) as checkpoint:
        source, objective, identity = yield from prepare(checkpoint, job)
        with lock(job.out):
            folder = claim(job.out, identity, outputs=OUTPUTS, force=job.force)
            folder = replace(folder, elsewhere={} if job.file is None else {MODEL: job.file})
            write_recipe(folder, job.recipe)
            if job.via:
                from recast.convert.chain import legs_stage

                yield from legs_stage(checkpoint, folder, job, source, objective, stopped)
            else:
                yield from train_stage(checkpoint, folder, job, source, objective, stopped)
            yield from write_files(checkpoint, folder, job, source, objective)
            processes.reached("over")
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
    from recast.convert import checks, exchange, pairs, proceed, start, texts
    from recast.convert.found import check_sizes, examples_of
    from recast.convert.sources import skips_broken, sources_of
    from recast.model.load import preferred_size

    checks.check_out(job.out)
    layout = checks.check_model(checkpoint, job.recipe)
    source, objective = checks.objectives(checkpoint, job)
    checks.check_way(job, source, objective)
    pairs.check(checkpoint, job, source, objective)
    checks.check_recipe(job, checkpoint)
    start.check(checkpoint, job, source, objective)
    texts.check(layout, job)
    proceed.check(checkpoint, layout, job, objective)
    vae = exchange.check(checkpoint, job)
    images = sources_of(job).images
    skipped = skips_broken(job)
    found = examples_of(images, skip_broken=skipped, recipe=job.recipe) if images else ()
    if found:
        processes.enough(len(found), "images")
        side = job.recipe.data.size or preferred_size(checkpoint, layout)
        check_sizes(found, side, skip_broken=skipped)
    identity = {**identify(checkpoint, job, source, objective, found), **vae}
    resumes = check_claim(job.out, identity, outputs=OUTPUTS, force=job.force)
    checks.check_file(job, identity)
    if not resumes:
        yield from start.check_distance(checkpoint, job)
        checks.check_room(checkpoint, layout, job)
        if found:
            yield from checks.check_images(found, skip_broken=skips_broken(job))
    return source, objective, identity


def identify(
    checkpoint: Checkpoint, job: Job, source: str, objective: str, found: tuple[Example, ...]
) -> dict[str, object]:
    """What names this run: the model, the images, the recipe."""
    from recast.convert import proceed
    from recast.convert.found import images_digest
    from recast.convert.sources import dream_plan, sources_of
    from recast.convert.start import identity

    data = [images_digest(found)] if found else []
    if sources_of(job).dreams:
        data.append(f"dreamt {dream_plan(job, checkpoint, objective).digest('')}")
    recipe = job.recipe.model_dump(exclude={"about"})
    # see in_header
    recipe["train"].pop("checkpoint_every")
    recipe["train"].pop("recompute")
    recipe.pop("save")
    return {
        "model": checkpoint.sha256(),
        "source": source,
        "objective": objective,
        "images": ", ".join(data),
        "recipe": recipe,
        **({"via": list(job.via)} if job.via else {}),
        **identity(job),
        **proceed.identity(job),
    }


def write_recipe(folder: Folder, recipe: Recipe) -> None:
    """Leave the resolved recipe in the run folder."""
    text = dump_toml(recipe).encode()
    if not folder.path("recipe.toml").exists():
        commit(folder.path("recipe.toml"), lambda file: file.write(text), size=len(text))


def in_header(recipe: Recipe) -> Recipe:
    """The recipe as a file states it: what was saved or recomputed is not part of the result."""
    usual = load()
    how = {"checkpoint_every": usual.train.checkpoint_every, "recompute": usual.train.recompute}
    return override(recipe, train=how, save=usual.save.model_dump())


def keeper(
    checkpoint: Checkpoint, folder: Folder, job: Job, objective: str
) -> Callable[[int, Adapter], None]:
    """What keeps an adapter of a step as a file: a LoRA as trainers write it, else factors."""
    from recast.adapter import write_adapter
    from recast.convert import saving
    from recast.convert.networks import DTYPES, kind_of, write_lora_file

    about = {**folder.stamp(), "recast.objective": objective}

    def keep(step: int, trained: Adapter) -> None:
        path = saving.path_of(folder.root, step)
        path.parent.mkdir(exist_ok=True)
        told = {**about, "recast.step": str(step)}
        if kind_of(job.recipe) == "lora":
            write_lora_file(path, told, checkpoint, job, trained)
        else:
            dtype = DTYPES[job.recipe.network.save]
            write_adapter(path, trained, metadata=told, dtype=dtype, force=True)
        saving.thin(folder.root, job.recipe)

    return keep


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
    from recast.adapter import write_adapter
    from recast.convert.start import as_it_is, begin

    about = {**folder.stamp(), "recast.objective": objective}
    place = folder.path("adapter.safetensors")
    if not job.trains:
        write_adapter(place, as_it_is(checkpoint, job), metadata=about, force=True)
        return
    from recast.convert.fixed import parts
    from recast.convert.material import gather
    from recast.convert.networks import put_in, text_parts
    from recast.convert.quantised import quantiser_of, report_base
    from recast.convert.training import learn
    from recast.objective import OBJECTIVES

    target = OBJECTIVES[objective]
    material = yield from gather(checkpoint, folder, job, source, target, stopped)
    quantiser = quantiser_of(checkpoint, folder, job)
    needed = (*parts(job.recipe), *text_parts(detect(checkpoint), job.recipe))
    model = open_part(checkpoint, job, source, needed, quantiser)
    if quantiser and processes.first():
        yield from report_base(folder, model, job, next(material.draws(0)), target)
    start = yield from begin(checkpoint, folder, model, job, material, target)
    attached = put_in(model, start, job.recipe)
    if processes.first():
        processes.reached("start")
    try:
        trained = yield from learn(
            model, attached, material, job.recipe, target, folder.root, folder.digest, stopped,
            keeper(checkpoint, folder, job, objective),
        )  # fmt: skip
    finally:
        attached.detach()
    if not processes.first():
        return
    write_adapter(place, trained, metadata=about, force=True)


def open_part(
    checkpoint: Checkpoint,
    job: Job,
    source: str,
    parts: tuple[str, ...],
    quantiser: Quantiser | None = None,
) -> Model:
    """The original's parts, and the VAE of the recipe, in its precision, on the job's device."""
    from recast.convert.exchange import with_vae
    from recast.convert.training import precision
    from recast.model import open_model

    dtype = precision(job.recipe, job.device)
    return open_model(
        with_vae(checkpoint, job.recipe), dtype=dtype, device=job.device, parts=parts,
        objective=source, quantiser=quantiser, lazily=True, together=True,
    )  # fmt: skip
