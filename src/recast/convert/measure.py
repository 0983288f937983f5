"""The measuring stage: the file that was written against the original it came from.

    original       its own sampler                    wrapper    the original sampled as the new objective
    converted      the new file, the new sampler      wrong      the new file, the old sampler

All from the same noise. The wrapper needs no training: its agreement is the ceiling of the measure.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from recast import __version__
from recast.checkpoint import Checkpoint
from recast.convert.folder import Folder
from recast.convert.material import images_of, training_captions
from recast.evaluate.agreement import agreement
from recast.evaluate.concepts import Concepts, concepts, present, scenes
from recast.evaluate.drift import drift
from recast.evaluate.identity import identity
from recast.evaluate.loading import how_to_load
from recast.evaluate.losses import losses_by_level
from recast.evaluate.metrics import statistics
from recast.evaluate.pictures import shots
from recast.evaluate.report import load_report, write_report
from recast.evaluate.values import Drift, Figure, File, Report, Shot, measured, unmeasured
from recast.events import Event, Note, Stage, Tick
from recast.objective import OBJECTIVES, Objective, express
from recast.sample.images import Picture, sample_images

if TYPE_CHECKING:
    from torch import Tensor

    from recast.convert import Job
    from recast.model import Model

UNJUDGED = 16  # pictures at most where no judge can make use of more
SHOWN = 8  # pictures in the report
USES = {
    "model.safetensors": "the converted checkpoint",
    "patch.safetensors": "the change alone; ComfyUI adds it to the original as a LoRA",
    "adapter.safetensors": "what was trained, in full precision",
    "initial.safetensors": "the adapter before training",
    "report.json": "these figures for programs",
}
NO_JUDGE = "no judge for this model"


@dataclass(frozen=True)
class Test:
    """What is painted: prompts, a seed each, and whether their concepts were in the training."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    seen: tuple[bool, ...]


def measure(
    checkpoint: Checkpoint, folder: Folder, job: Job, source: str, objective: str
) -> Iterator[Event]:
    """Write the report unless this run has one already; yields progress."""
    files = hashes(folder)
    if finished(folder, files):
        yield Note("The report is written already.")
        return
    from recast.model import open_model

    captions = training_captions(job, checkpoint, folder)
    old, new = OBJECTIVES[source], OBJECTIVES[objective]
    test = choose(job, checkpoint, captions)
    total = len(test.prompts)
    yield Stage("paint and compare", 3 * total + min(SHOWN, total), "pictures")
    made: dict[str, list[Picture]] = {"original": [], "wrapper": [], "converted": [], "wrong": []}
    ticks = 0
    model = open_model(job.model, device=job.device, objective=source)
    table = measure_drift(model, folder, job, test, old, new)
    for name, as_objective in (("original", None), ("wrapper", new)):
        for picture in paint(model, job, test, as_objective):
            made[name].append(picture)
            yield Tick(ticks := ticks + 1)
    del model
    written = open_model(folder.path("model.safetensors"), device=job.device, objective=objective)
    few = replace(test, prompts=test.prompts[:SHOWN], seeds=test.seeds[:SHOWN])
    for name, model, asked in (
        ("converted", written, test),
        ("wrong", replace(written, objective=old), few),
    ):
        for picture in paint(model, job, asked, None):
            made[name].append(picture)
            yield Tick(ticks := ticks + 1)
    standard = written.layout.unet["block_out_channels"][0] == 320
    howto = how_to_load(written.layout.family, objective, "model.safetensors", standard=standard)
    pictures = {name: [picture.image for picture in group] for name, group in made.items()}
    report = compose(job, folder, test, pictures, table, source, objective)
    write_report(
        folder.root,
        replace(report, howto=howto, hashes=files, losses=losses(folder), files=listing(folder)),
    )


def paint(model: Model, job: Job, test: Test, as_objective: Objective | None) -> Iterator[Picture]:
    """The test's pictures, with the sampler that fits."""
    how = job.recipe.evaluate
    yield from sample_images(
        model, test.prompts, seeds=test.seeds, steps=how.steps, solver=how.solver,
        scale=how.guidance, batch=how.batch, as_objective=as_objective,
    )  # fmt: skip


def choose(job: Job, checkpoint: Checkpoint, captions: Sequence[str]) -> Test:
    """Prompts to paint: where a judge exists, half with concepts of the training, half without."""
    how = job.recipe.evaluate
    pool = prompt_pool(job, checkpoint)
    generator = torch.Generator().manual_seed(how.seed)

    def some(prompts: Sequence[str], count: int) -> list[str]:
        order = torch.randperm(len(prompts), generator=generator).tolist()
        return [prompts[k] for k in order[:count]]

    if scenes(pool) is None:
        chosen = some([*dict.fromkeys(captions)], UNJUDGED // 2) if images_of(job) else []
        chosen += some(pool, min(how.pictures, UNJUDGED) - len(chosen))
        seen = [True] * len(chosen)
    else:
        inside, outside = split_pool(pool, captions)
        fresh = some(outside, how.pictures // 2)
        known = some(inside, how.pictures - len(fresh))
        # alternate, so that the first few that the report shows are of both kinds
        pairs = [*zip(known, fresh, strict=False)]
        rest = known[len(pairs) :] + fresh[len(pairs) :]
        chosen = [prompt for pair in pairs for prompt in pair] + rest
        seen = [prompt in set(known) for prompt in chosen]
    seeds = tuple(how.seed + k for k in range(len(chosen)))
    return Test(tuple(chosen), seeds, tuple(seen))


def prompt_pool(job: Job, checkpoint: Checkpoint) -> list[str]:
    """The recipe's file of prompts, every caption of the pocket world, or the list that ships."""
    from recast.dream import prompts_for
    from recast.pocket.world import caption
    from recast.pocket.world import scenes as world

    file = job.recipe.evaluate.prompts
    if not file and checkpoint.metadata.get("recast.world") == "pocket":
        return [caption(scene) for scene in world()]
    return list(prompts_for(Path(file) if file else None, checkpoint))


def split_pool(pool: Sequence[str], captions: Sequence[str]) -> tuple[list[str], list[str]]:
    """Prompts whose concepts the training had, and those it had not.

    Absent is a word that no caption has; where captions have every word, a combination that the
    pocket checkpoints never saw either.
    """
    from recast.pocket.world import is_held, parse

    taught = [prompt for prompt in pool if not is_held(parse(prompt))]
    flags = present(taught, captions)
    absent = [prompt for prompt, flag in zip(taught, flags, strict=True) if not flag]
    inside = [prompt for prompt, flag in zip(taught, flags, strict=True) if flag]
    return inside, absent or [prompt for prompt in pool if is_held(parse(prompt))]


def measure_drift(
    model: Model, folder: Folder, job: Job, test: Test, old: Objective, new: Objective
) -> Drift:
    """Drift of the trained network, original and trained in one, on the original's own latents."""
    from recast.adapter import attach, read_adapter

    trained = read_adapter(folder.path("patch.safetensors"))
    sites = model.layout.sites("every")
    how = job.recipe.evaluate
    prompts, seeds = test.prompts[: how.batch], test.seeds[: how.batch]
    condition = model.condition(prompts)
    latents = self_made(model, prompts, seeds, how.steps)
    attached = attach({"unet": model.unet}, trained, sites)

    def original(bound: object):  # noqa: ANN202
        net = express(model.net(bound), old, new)

        def answer(x: Tensor, t: Tensor) -> Tensor:
            with attached.teacher():
                return net(x, t)

        return answer

    try:
        return drift(
            lambda bound: model.net(bound, new), original, new, [latents], [condition],
            source=old, bins=how.bins, seed=how.seed,
        )  # fmt: skip
    finally:
        attached.detach()


def self_made(model: Model, prompts: Sequence[str], seeds: Sequence[int], steps: int) -> Tensor:
    """Latents (B, C, h, w) of the original's own pictures: data it certainly knows."""
    from recast.sample.images import sample_latents
    from recast.timesteps import grid

    shape = model.latent_shape(None)
    eps = torch.stack(
        [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    ).to(model.device)
    times = grid(model.objective.path, steps)
    net = model.net(model.condition(prompts))
    x = eps
    for step in sample_latents(net, model.objective, eps, times):
        x = step.x
    return x


def compose(
    job: Job,
    folder: Folder,
    test: Test,
    pictures: dict[str, list[Tensor]],
    table: Drift,
    source: str,
    objective: str,
) -> Report:
    """Everything that was measured, as a report."""
    worlds = scenes(test.prompts)
    found: dict[str, Concepts] = {}
    if worlds is not None:
        for name, group in pictures.items():
            some = slice(len(group))
            found[name] = concepts(group, worlds[some], test.seen[some])
    ceiling = agreement(pictures["original"], pictures["wrapper"]).mean
    reached = agreement(pictures["original"], pictures["converted"]).mean
    judged = (found["converted"].right, found["wrong"].right) if found else None
    return Report(
        model=job.model.name,
        source=source,
        target=objective,
        psnr_same_noise_db=measured(
            ceiling, reached, count=len(test.prompts),
            note="original: the untrained exact wrapper, the ceiling of this measure",
        ),
        drift=table,
        identity=identity(
            pictures["original"], pictures["converted"], pictures["wrong"], judged=judged
        ),
        shots=picked(test, pictures),
        statistics={name: statistics(group) for name, group in pictures.items() if group},
        settings=job.recipe.model_dump(exclude={"about"}),
        version=__version__,
        command=command(job, objective),
        **judged_figures(found),
    )  # fmt: skip


def judged_figures(found: dict[str, Concepts]) -> dict[str, object]:
    """Alignment, retention, leakage and the attributes, of the original and the converted."""
    if not found:
        names = ("alignment", "retention", "leakage")
        return {name: unmeasured(NO_JUDGE) for name in names}
    old, new = found["original"], found["converted"]

    def share(name: str, count: int) -> Figure:
        if not count:
            return unmeasured("no prompt of this kind")
        return measured(getattr(old, name), getattr(new, name), count=count)

    return {
        "alignment": share("alignment", old.seen),
        "retention": share("retention", old.absent),
        "leakage": share("leakage", old.seen + old.absent),
        "attributes": {
            name: measured(old.attributes[name], new.attributes[name]) for name in old.attributes
        },
    }


def picked(test: Test, pictures: dict[str, list[Tensor]]) -> tuple[Shot, ...]:
    few = slice(SHOWN)
    return shots(
        test.prompts[few], test.seeds[few], pictures["original"][few], pictures["converted"][few],
        pictures["wrong"],
    )  # fmt: skip


def command(job: Job, objective: str) -> str:
    """The command that repeats this run."""
    import shlex

    words = ["recast", "convert", job.model.stem if _shipped(job.model) else str(job.model)]
    words += ["--to", objective, "--out", str(job.out)]
    words += ["--images", str(job.images)] if job.images else []
    return shlex.join(words)


def _shipped(path: Path) -> bool:
    from recast import pocket

    return any(path == pocket.path(name) for name in pocket.NAMES)


def losses(folder: Folder):  # noqa: ANN201
    """The log's losses by noise level."""
    lines = folder.path("log.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return losses_by_level((row["step"], row["losses"], row["t"]) for row in rows)


def hashes(folder: Folder) -> dict[str, str]:
    """Sha256 of the files that the run wrote."""
    found = {}
    for name in USES:
        if name.endswith(".safetensors") and folder.has(name):
            with Checkpoint(folder.path(name)) as file:
                found[name] = file.sha256()
    return found


def finished(folder: Folder, files: dict[str, str]) -> bool:
    """Whether there is a report of exactly these files."""
    from recast.errors import Refused

    if not (folder.path("report.html").exists() and folder.path("report.json").exists()):
        return False
    try:
        return dict(load_report(folder.root).hashes) == files
    except Refused:
        return False


def listing(folder: Folder) -> tuple[File, ...]:
    """The run's files, with their sizes and uses."""
    paths = ((name, folder.path(name)) for name in USES)
    return tuple(
        File(name, path.stat().st_size, USES[name]) for name, path in paths if path.exists()
    )
