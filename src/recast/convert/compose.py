"""What was measured, put together as a report: figures, pictures, files, the command."""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import dataclass
from os.path import relpath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recast import __version__
from recast.checkpoint import Checkpoint
from recast.convert.bridge import FAR, Bridge
from recast.convert.bridge import read as read_bridge
from recast.convert.folder import Folder
from recast.errors import Refused
from recast.evaluate.agreement import agreement
from recast.evaluate.concepts import Concepts, concepts, scenes
from recast.evaluate.course import course
from recast.evaluate.identity import identity
from recast.evaluate.likeness import likeness
from recast.evaluate.losses import losses_by_level
from recast.evaluate.metrics import statistics
from recast.evaluate.pictures import shots
from recast.evaluate.report import load_report
from recast.evaluate.values import (
    Drift,
    Figure,
    File,
    Losses,
    Report,
    Shot,
    measured,
    unmeasured,
)
from recast.recipe import load, override

if TYPE_CHECKING:
    from torch import Tensor

    from recast.convert import Job

SHOWN = 8  # pictures in the report
USES = {
    "model.safetensors": "the converted checkpoint",
    "patch.safetensors": "the change alone; ComfyUI adds it to the original as a LoRA",
    "adapter.safetensors": "what was trained, in full precision",
    "initial.safetensors": "the adapter before training",
    "start.safetensors": "the changes that training began with",
}
NO_JUDGE = "no judge for this model"


@dataclass(frozen=True)
class Test:
    """What is painted: prompts, a seed each, and whether their concepts were in the training."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    seen: tuple[bool, ...]


@dataclass(frozen=True)
class Judged:
    """The figures that need a judge."""

    alignment: Figure
    retention: Figure
    leakage: Figure
    attributes: dict[str, Figure]


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
    judged = judge(found)
    right = (found["converted"].right, found["wrong"].right) if found else None
    return Report(
        model=job.model.name,
        source=source,
        target=objective,
        alignment=judged.alignment,
        retention=judged.retention,
        leakage=judged.leakage,
        attributes=judged.attributes,
        psnr_same_noise_db=same_noise(pictures, read_bridge(folder)),
        drift=table,
        identity=identity(
            pictures["original"], pictures["converted"], pictures["wrong"], judged=right
        ),
        shots=picked(test, pictures),
        statistics={name: statistics(group) for name, group in pictures.items() if group},
        settings=job.recipe.model_dump(exclude={"about"}),
        version=__version__,
        command=command(job, objective),
        likeness=likeness(pictures["original"], pictures["converted"]),
        judged=by_judges(job, test, pictures),
        losses=losses(log_of(job, folder, objective)),
        course=course(rows_of(log_of(job, folder, objective))),
        files=listing(folder),
        notes=notes(job, folder),
    )  # fmt: skip


def same_noise(pictures: dict[str, list[Tensor]], bridge: Bridge | None) -> Figure:
    """Agreement from the same noise; in another latent space from the noise carried there."""
    note, best = "original: the untrained exact wrapper, the ceiling of this measure", "wrapper"
    if bridge is not None:
        if not bridge.residual <= FAR:
            return unmeasured("another latent space: the same noise is another picture")
        note, best = (
            (
                "original: its own pictures through the new VAE, the ceiling of this measure; the "
                "noise was carried over by a rotation"
            ),
            "through the VAE",
        )
    old = pictures["original"]
    ceiling, reached = (agreement(old, pictures[name]).mean for name in (best, "converted"))
    return measured(ceiling, reached, count=len(old), note=note)


def judge(found: dict[str, Concepts]) -> Judged:
    """Alignment, retention, leakage and the attributes, of the original and the converted."""
    if not found:
        unknown = unmeasured(NO_JUDGE)
        return Judged(unknown, unknown, unknown, {})
    old, new = found["original"], found["converted"]

    def share(name: str, count: int) -> Figure:
        if not count:
            return unmeasured("no prompt of this kind")
        return measured(getattr(old, name), getattr(new, name), count=count)

    return Judged(
        share("alignment", old.seen),
        share("retention", old.absent),
        share("leakage", old.seen + old.absent),
        {name: measured(old.attributes[name], new.attributes[name]) for name in old.attributes},
    )


def picked(test: Test, pictures: dict[str, list[Tensor]]) -> tuple[Shot, ...]:
    """The first few pictures, as the report shows them."""
    few = slice(SHOWN)
    return shots(
        test.prompts[few], test.seeds[few], pictures["original"][few], pictures["converted"][few],
        pictures["wrong"],
    )  # fmt: skip


def command(job: Job, objective: str) -> str:
    """The command that repeats this run, from the recipe that its folder holds."""
    model = job.model.stem if _shipped(job.model) else str(job.model)
    if job.file is not None:
        words = ["recast", "patch", model, str(job.start), "--out", str(job.file)]
        words += ["--polish", str(job.recipe.train.steps)] if job.trains else []
    else:
        words = ["recast", "convert", model, "--to", objective, "--out", str(job.out)]
        words += [word for name in job.via for word in ("--via", name)]
        words += ["--from", str(job.start)] if job.start else []
    words += ["--far"] if job.far else []
    words += ["--images", str(job.images)] if job.images else []
    words += ["--pairs", str(job.pairs)] if job.pairs else []
    words += ["--source", job.source] if job.source else []
    usual = override(load(), objective=objective)
    if job.file is not None:
        usual = override(load("polish"), objective=objective, steps=job.recipe.train.steps)
    if job.recipe != usual:
        words += ["--recipe", str(job.out / "recipe.toml")]
    return shlex.join(words)


def _shipped(path: Path) -> bool:
    from recast import pocket

    return any(path == pocket.path(name) for name in pocket.NAMES)


def losses(log: Path) -> Losses | None:
    """A log's losses by noise level; None where nothing was trained."""
    return losses_by_level(
        # JSON has no word for what is not finite, so the log holds null
        (row["step"], [math.nan if loss is None else loss for loss in row["losses"]], row["t"])
        for row in rows_of(log)
    )


def rows_of(log: Path) -> list[dict[str, Any]]:
    """The lines of a training log; none where nothing was trained."""
    if not log.exists():
        return []
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]


def by_judges(job: Job, test: Test, pictures: dict[str, list[Tensor]]) -> dict[str, Figure]:
    """What the recipe's CLIP and DINOv2 models say of the original's and the converted pictures."""
    from recast.evaluate.judges import Clip, open_judge

    old, new, count = pictures["original"], pictures["converted"], len(test.prompts)
    found = {}
    for folder in job.recipe.evaluate.judges:
        judge = open_judge(Path(folder), job.device)
        if isinstance(judge, Clip):
            scores = [judge.score(group, test.prompts) for group in (old, new)]
            found["CLIP score"] = measured(*scores, count=count)
        elif count > 1:
            floor = judge.distance(old, pictures["wrapper"])
            found["FD-DINOv2"] = measured(
                floor, judge.distance(old, new), count=count,
                note=f"from the original's {count} pictures; the first is the untrained wrapper's",
            )  # fmt: skip
    return found


def log_of(job: Job, folder: Folder, objective: str) -> Path:
    """The run's training log; of several legs the last one's."""
    if not job.via:
        return folder.path("log.jsonl")
    from recast.convert.chain import legs

    return legs(job, objective)[-1].out / "log.jsonl"


def notes(job: Job, folder: Folder) -> tuple[str, ...]:
    """How the run began, where that was not from nothing, and what it went through."""
    from recast.convert.quantised import in_words, read_facts
    from recast.convert.start import told

    with Checkpoint(folder.path("adapter.safetensors")) as file:
        found = told(file.metadata)
    if bridge := read_bridge(folder):
        found += (f"Another VAE, {job.recipe.data.vae}. {bridge.in_words()}",)
    if facts := read_facts(folder):
        found += (in_words(facts),)
    if job.via:
        found += (f"By way of {', '.join(job.via)}: the losses shown are the last leg's.",)
    return found if job.trains else (*found, "Nothing was trained: the patch was added as it is.")


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
        File(relpath(path, folder.root), path.stat().st_size, USES[name])
        for name, path in paths
        if path.exists()
    )
