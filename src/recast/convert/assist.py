"""The part of a run that every process but the first takes: it trains along and writes nothing.

first     checks, makes caches and the start | trains, looks, logs, saves | writes, measures
others    wait                               | train along                | have ended
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from recast import processes
from recast.convert import sharing
from recast.errors import Refused, Stopped
from recast.events import Event
from recast.recipe import Recipe, override

if TYPE_CHECKING:
    from recast.adapter import Attached
    from recast.convert import Job
    from recast.convert.course import Course
    from recast.convert.moving import Moving
    from recast.model import Model
    from recast.train import Step


def assist(job: Job, stopped: Callable[[], int]) -> Iterator[Event]:
    """Wait for the first process to come as far as training, then train along."""
    from recast.convert import prepare, train_stage
    from recast.convert.folder import Folder, digest_of
    from recast.layout import open_checkpoint

    if processes.wait(("start", "over"), stopped) == "over":
        return
    with open_checkpoint(job.model) as checkpoint:
        source, objective, identity = yield from prepare(checkpoint, job)
        folder = Folder(job.out, digest_of(identity))
        yield from train_stage(checkpoint, folder, job, source, objective, stopped)


def widened(job: Job) -> Job:
    """A job whose steps take in what all processes do: `accumulate` is that of each one.

    The result is that of one process which accumulates it all, and so is the run's name.
    """
    if not processes.several():
        return job
    if job.via:
        raise Refused("--via takes one process: launch each leg by itself, or leave --via out.")
    if processes.sharing():
        sharing.check(job.recipe)
    return replace(job, recipe=wide(job.recipe))


def wide(recipe: Recipe) -> Recipe:
    how = recipe.train
    return override(recipe, train={"accumulate": how.accumulate * processes.count()})


def meet(course: Course, step: Step, signal: int) -> int:
    """After a step: what was read and when the run ends go to all; returns anybody's signal."""
    if not processes.several():
        return signal
    watch = course.watch
    if watch.due(step.step):
        watch.readings = processes.told(watch.readings)
    signal, cut = processes.agree(signal, watch.cut or 0)
    watch.cut = cut or None
    return signal


def along(
    course: Course,
    model: Model,
    attached: Attached,
    steps: Iterator[Step],
    stopped: Callable[[], int],
) -> Iterator[Event]:
    """Take the steps that the first process takes, until it stops.

    Where weights are shared out, whatever it computes or saves takes everybody's.
    """
    from recast.convert.moving import Moving

    watch, moving = course.watch, Moving.of(attached, model.layout, course.recipe)
    if course.shards and not (watch.readings or course.done):
        watch.look(0)
    if not course.done:
        watch.readings = processes.told()
    for step in steps if course.done < watch.end else ():
        if course.shards:
            course.look(step)
        else:
            course.beside.update(step)
        signal = meet(course, step, stopped())
        if course.shards:
            take_part(course, attached, moving, step, bool(signal))
        if signal:
            raise Stopped(signal, f"stopped after step {step.step}.")
        if step.step == watch.end:
            break
    yield from ()


def take_part(course: Course, attached: Attached, moving: Moving, step: Step, stops: bool) -> None:
    """Give one's rows for what the first process logs, keeps and saves after a step."""
    from recast.convert import saving

    if moving.due(step.step, course.watch.end):
        moving.norms()
    if saving.due(course.recipe, step.step):
        with course.shown():
            attached.trained()
    if stops or course.due(step):
        course.save(step, None)
