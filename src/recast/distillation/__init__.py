"""The whole distillation, top to bottom: an original in, a student beside it, and the proof.

    config -> material (pictures or dreams) -> teacher and student -> profile -> steps -> files

The same command goes on at the first thing missing; see `folder` for what lies where.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from recast import processes
from recast.commit import lock
from recast.distillation.config import Config, dump_toml
from recast.distillation.folder import MODEL, REPORT, Identity, claim, write_json
from recast.distillation.folder import check as check_folder
from recast.errors import Refused
from recast.events import Event, Note

if TYPE_CHECKING:
    from recast.checkpoint import Checkpoint
    from recast.distill.sampler import TimeSampler
    from recast.distillation.guidance import Guide
    from recast.distillation.material import Material
    from recast.distillation.networks import Pair
    from recast.model import Model

__all__ = ["Config", "Job", "run"]


@dataclass(frozen=True)
class Job:
    """A resolved config, the original's file, where to compute, and whether to start anew."""

    config: Config
    model: Path
    device: str = "cpu"
    force: bool = False

    @property
    def out(self) -> Path:
        return Path(self.config.run.out)


def run(job: Job, stopped: Callable[[], int] = lambda: 0) -> Iterator[Event]:
    """Do the job, or what is missing of it; yields progress.

    Raises Refused for bad input before anything is written, NotFinite when training is lost,
    CheckFailed when a file is not the student, NotSent when an upload fails, Stopped on a signal.
    """
    from recast.distillation import judging, sharing, upload
    from recast.layout import open_checkpoint

    processes.join()
    job = replace(job, config=sharing.widened(job.config))
    stopped = processes.passed_on(stopped)
    if not processes.first():
        yield from sharing.assist(job, stopped)
        return
    config = job.config
    with open_checkpoint(job.model) as checkpoint:
        identity = checked(checkpoint, job)
        with lock(job.out):
            claim(job.out, identity, dump_toml(config), job.force)
            yield Note(f"Config {config.digest()}: {job.out / 'config.toml'} holds every key.")
            for line in upload.unfinished(job.out):
                yield Note(line)
            model = yield from learned(job, checkpoint, identity, stopped)
            figures = yield from judging.judged(model, config, job.out)
            write_json(job.out / REPORT, {**judging.summary(job.out), **figures})
            if config.save.upload:
                yield from upload.upload(
                    job.out, job.out / MODEL, config.save.upload, config.save.tries
                )


def learned(
    job: Job, checkpoint: Checkpoint, identity: Identity, stopped: Callable[[], int]
) -> Generator[Event, None, Model]:
    """Make the material and train on it, or find that done; returns the original."""
    from recast.distillation.material import gather
    from recast.distillation.networks import open_original, pair

    model = open_original(checkpoint, job.config, job.device)
    material = yield from gather(model, job.config, job.out, stopped)
    with pair(model, job.config, blocks(job.config)) as both:
        yield from trained(job, both, material, identity, stopped)
    return model


def trained(
    job: Job, both: Pair, material: Material, identity: Identity, stopped: Callable[[], int]
) -> Iterator[Event]:
    """Profile, test, and take the steps that are left."""
    from recast.distillation.guidance import open_guide
    from recast.distillation.training import Course, learn

    config = job.config
    guide = open_guide(config, both.tap, both.teacher.objective, job.device)
    digest = digest_of(identity)
    times = yield from times_of(job, both, guide, material, digest)
    yield Note(f"Learning {both.objective.name} ({config.target.kind}), {told(guide)}.")
    if processes.first():
        processes.reached("start")
    course = Course.begun(both, config, job.out, digest, guide)
    yield from learn(course, material, times, stopped)


def times_of(
    job: Job, both: Pair, guide: Guide, material: Material, digest: str
) -> Generator[Event, None, TimeSampler]:
    """The sampler of the run's times: even, or by what the assessor finds hard."""
    from recast.distill.sampler import Profile, sampler
    from recast.distillation import guidance

    config, how = job.config, job.config.times
    profile = Profile.flat(how.bins)
    if guide.assessor is not None:
        rest = (both.teacher, material, config)
        found = yield from guidance.profiled(guide, *rest, job.out, digest, job.device)
        guide.active = guidance.believed(found, config)
        guidance.self_test(guide, *rest, job.device)
        yield Note(f"{int(guide.active.sum())} of the assessor's {len(guide.active)} bins count.")
        if how.sampler == "assessor":
            objectives = (both.objective, both.teacher.objective)
            profile = guidance.carried(found, guide.active, config, *objectives)
    return sampler(
        profile, toward=how.toward, shift=how.shift, gamma=how.gamma, eta=how.eta,
        jitter=how.jitter, chaos=how.chaos, importance=how.importance,
    )  # fmt: skip


def checked(checkpoint: Checkpoint, job: Job) -> Identity:
    """Check everything that can be, writing nothing; returns what names the run."""
    from recast.distillation import upload
    from recast.distillation.material import found_images, images_digest, plan_of
    from recast.layout import detect
    from recast.layout.names import PART_NAMES
    from recast.model import stated_objective

    config, layout = job.config, detect(checkpoint)
    stated_objective(checkpoint, config.run.source or None)
    needed = [*(["vae"] if config.data.images or config.evaluate.pictures else [])]
    for part in (*needed, *(p for p in layout.missing if p != "vae")):
        if part in layout.missing:
            raise Refused(
                f"{checkpoint.path} has no {PART_NAMES[part]}, which distilling needs: give a full "
                "checkpoint."
            )
    if config.data.images:
        if not Path(config.data.images).exists():
            raise Refused(f"data.images {config.data.images} does not exist: check the path.")
        found = found_images(config).examples
        if not found:
            raise Refused(
                f"{config.data.images} has no picture, so there is no latent source: give images, "
                "or leave data.images empty and let the teacher dream."
            )
        processes.enough(len(found), "images")
    elif not plan_of(config, checkpoint).prompts:
        raise Refused("there is no prompt, so there is no latent source: give data.prompts.")
    if config.save.upload:
        upload.place_of(config.save.upload)
    layout.sites(config.student.profile)
    assessor = sha_of(config.blocks.assessor, "blocks.assessor")
    identity = Identity(checkpoint.sha256(), assessor, images_digest(config), config.digest())
    check_folder(job.out, identity, dump_toml(config), job.force)
    return identity


def sha_of(path: str, key: str) -> str:
    """Hash of a file that a key names; "" for none."""
    from recast.checkpoint import Checkpoint
    from recast.distillation.guidance import blocks_of

    if not path:
        return ""
    if not Path(path).is_file():
        raise Refused(f"{key} {path} does not exist: make one with recast assessor train.")
    blocks_of(path)
    with Checkpoint(path) as file:
        return file.sha256()


def blocks(config: Config) -> tuple[str, ...] | None:
    """The blocks to tap: those the assessor reads, or all."""
    from recast.distillation.guidance import blocks_of

    return blocks_of(config.blocks.assessor)


def digest_of(identity: Identity) -> str:
    """16 hex digits of what went in."""
    import hashlib
    import json

    text = json.dumps(identity.as_json(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def told(guide: Guide) -> str:
    """How the blocks weigh, in words."""
    if guide.assessor is None:
        return "every block by its own weight, without an assessor"
    return f"blocks weighed by {guide.settings.assessor}, {guide.settings.signals} signals"
