"""The training stage: an attached adapter and a material of draws in, a trained adapter out."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from recast import processes
from recast.convert import saving, sharing
from recast.convert.assist import along, meet
from recast.convert.budget import settled
from recast.convert.course import Course
from recast.convert.losses import loss_of
from recast.convert.moving import Moving, write_picture
from recast.convert.networks import shaken
from recast.convert.running import running, told
from recast.convert.speed import Speed
from recast.convert.texts import current
from recast.convert.trunk import Trunk, shared
from recast.errors import NotFinite, Stopped
from recast.events import Event, Note, Stage, Tick
from recast.model import usual_dtype
from recast.objective import Net, Objective
from recast.recipe import Recipe
from recast.timesteps import piecewise
from recast.train import (
    Draw,
    Step,
    Target,
    append,
    checked,
    from_data,
    from_teacher,
    guided,
    mix,
    open_log,
    schedule_of,
    team,
    train,
)

if TYPE_CHECKING:
    from torch import Tensor

    from recast.adapter import Adapter, Attached
    from recast.convert.bridge import Bridge
    from recast.convert.material import Material
    from recast.model import Model
    from recast.text.encode import Condition

PRECISION = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def learn(
    model: Model,
    attached: Attached,
    material: Material,
    recipe: Recipe,
    objective: Objective,
    root: Path,
    identity: str,
    stopped: Callable[[], int],
    keep: Callable[[int, Adapter], None] | None = None,
) -> Generator[Event, None, Adapter]:
    """Train until the recipe's last step, resuming from the newest whole state below `root`.

    Returns the trained adapter; `keep` is given those that the recipe saves on the way. Where steps
    stop being finite, goes back to the last state at a lower rate. Raises NotFinite when that does
    not help, Diverged when the run collapses, Stopped on a signal.
    """
    recipe = settled(recipe, material)
    with running(model, attached, recipe), sharing.together():
        yield Note(told(model, recipe))
        yield from sharing.spread(model)
        course = Course.begun(model, attached, recipe, objective, root, identity)
        yield from course.resume()
        while True:
            try:
                rest = (course, model, attached, material, objective, stopped, keep)
                yield from (follow if processes.first() else trained_along)(*rest)
                break
            except NotFinite as error:
                course = course.rolled_back(error, model, attached, objective)
                yield Note(f"{error}: going back to step {course.done} at half the rate.")
        with course.shown():
            return attached.trained()


def follow(
    course: Course,
    model: Model,
    attached: Attached,
    material: Material,
    objective: Objective,
    stopped: Callable[[], int],
    keep: Callable[[int, Adapter], None] | None = None,
) -> Iterator[Event]:
    """Take the steps that are left, and log, look and save on the way."""
    watch, root = course.watch, course.root
    untrained = None if watch.readings or course.done else watch.look(0)
    if processes.several() and not course.done:
        processes.told(watch.readings)
    moving, speed = Moving.of(attached, model.layout, course.recipe), Speed(model.device)
    yield Stage("train", watch.end, "steps", course.done)
    steps = course.timed(steps_of(course, model, attached, material, objective))
    with ExitStack() as stack:
        log = stack.enter_context(open_log(root / "log.jsonl", course.length))
        board = stack.enter_context(Board(root / "tb", course.done))
        if untrained is not None:
            board.write(0, untrained.scalars)
        for step in steps if course.done < watch.end else ():
            looked = course.look(step)
            # processes agree first; one alone asks when the step has been told of
            signal = meet(course, step, stopped()) if processes.several() else 0
            begun = {"untrained": untrained.record} if untrained and step.step == 1 else {}
            seen = {"change": moving.norms()} if moving.due(step.step, watch.end) else {}
            seen["pace"] = speed.lap()
            append(log, record(step) | begun | course.told() | looked.record | seen)
            board.add(step, {**looked.scalars, **flat(seen)})
            yield Tick(step.step, step.loss)
            yield from looked.events
            if step.skipped:
                yield Note(f"Step {step.step} is skipped: loss {step.loss}, norm {step.grad_norm}.")
            watch.check(step.step)
            if not processes.several():
                signal = stopped()
            if keep is not None and saving.due(course.recipe, step.step):
                with course.shown():
                    keep(step.step, attached.trained())
            if signal or course.due(step):
                course.save(step, log)
            if signal:
                raise Stopped(
                    signal, f"stopped after step {step.step}; the same command goes on there."
                )
            if step.step == watch.end:
                break
    write_picture(root)


def trained_along(
    course: Course,
    model: Model,
    attached: Attached,
    material: Material,
    objective: Objective,
    stopped: Callable[[], int],
    *_: object,
) -> Iterator[Event]:
    """The same on a process that is not the first: nothing is written."""
    steps = steps_of(course, model, attached, material, objective)
    yield from along(course, model, attached, steps, stopped)


def steps_of(
    course: Course, model: Model, attached: Attached, material: Material, objective: Objective
) -> Iterator[Step]:
    """The steps of a course, one after the other, from where it stands."""
    recipe, how = course.recipe, course.recipe.train
    trunk = None
    if course.shards is None:  # its weights are only there while the whole network computes
        trunk = shared(model.unet, attached, model.objective, objective)
    target = target_of(recipe, model, attached, objective, material.null(), trunk, material.bridge)
    plain = schedule(recipe) if course.watch.pace is None else course.watch.factor
    draws = checked(material.draws(course.done, course.beside.aware), objective)
    return train(
        student(model, objective, trunk),
        shaken(draws, recipe, course.done),
        loss_of(recipe, target, objective, course.beside.learned),
        course.optimizer,
        accumulate=how.accumulate // processes.count(),
        clip=how.clip or None,
        schedule=lambda done: course.factor * plain(done),
        ema=course.ema,
        done=course.done,
        skipped=course.skipped,
        partner=course.beside.partner,
        scaler=course.scaler,
        move=course.move,
        team=team(course.shards),
    )


def precision(recipe: Recipe, device: str) -> torch.dtype:
    """The dtype of the frozen network; masters and losses are fp32 whatever it is."""
    name = recipe.train.precision
    if name == "auto":
        return usual_dtype(device)
    return PRECISION[name]


def student(
    model: Model, objective: Objective, trunk: Trunk | None = None
) -> Callable[[Draw], Tensor]:
    """The network as it is being trained, told the times of the new objective's path."""

    def answer(draw: Draw) -> Tensor:
        if draw.shake is not None:
            torch.manual_seed(draw.shake)
        known = trunk.answer(draw.x, draw.condition) if trunk else None
        if known is not None:
            return known
        return model.net(current(model, draw.condition), objective)(draw.x, draw.t)

    return answer


def target_of(
    recipe: Recipe,
    model: Model,
    attached: Attached,
    objective: Objective,
    null: Condition,
    trunk: Trunk | None = None,
    bridge: Bridge | None = None,
) -> Target:
    """The recipe's target: the data, the original in the same network, or a mix of the two.

    The original answers in its own latent space, and over the bridge in another. `null` is the
    condition without a prompt, one row; guidance of the original leans on it.
    """
    how = recipe.target

    def original(condition: Any) -> Net:
        net = model.net(condition)

        def answer(x: Tensor, t: Tensor) -> Tensor:
            with attached.teacher(), trunk.recorded(x, condition) if trunk else nullcontext():
                return net(x, t)

        return answer if bridge is None else bridge.carried(answer, model.objective)

    def unprompted(condition: Condition) -> Condition:
        rows = null.to(model.device).expand(len(condition))
        return replace(rows, time_ids=condition.time_ids)

    asked = original if how.guided == 1 else guided(original, unprompted, how.guided)
    data = from_data(objective)
    teacher = from_teacher(asked, model.objective, objective, above=how.above, control=how.control)
    share = piecewise(how.mix)
    return {
        "data": data,
        "teacher": teacher,
        "mix": mix((data, share), (teacher, lambda t: 1 - share(t))),
    }[how.teacher]


def schedule(recipe: Recipe) -> Callable[[int], float]:
    """The recipe's learning rate as a factor of the step."""
    how = recipe.train
    return schedule_of(
        how.schedule, how.limit, cycles=how.cycles, power=how.power, floor=how.floor,
        rise=how.warmup,
    )  # fmt: skip


def record(step: Step) -> dict[str, Any]:
    """A step as a line of `log.jsonl`; `t` and `losses` are per sample."""
    return {
        "step": step.step,
        "loss": step.loss,
        "grad_norm": step.grad_norm,
        "lr": step.lr,
        "d": step.d,
        "skipped": step.skipped,
        **({"scale": step.scale} if step.scale != 1 else {}),
        **({"rates": dict(step.rates)} if step.rates else {}),
        "t": [round(value, 5) for value in step.times.tolist()],
        "losses": [float(f"{value:.5g}") for value in step.losses.tolist()],
    }


def flat(figures: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Figures by names such as `pace/it_s`."""
    return {f"{group}/{name}": v for group, found in figures.items() for name, v in found.items()}


class Board:
    """TensorBoard events under kohya's names, plus the loss per tenth of the path."""

    def __init__(self, folder: Path, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # what a run that was killed or went back wrote of later steps
        purged = (done + 1 if done else 0) if folder.exists() else None
        self.writer = SummaryWriter(str(folder), purge_step=purged)
        self.mean: float | None = None

    def add(self, step: Step, more: Mapping[str, float]) -> None:
        self.mean = step.loss if self.mean is None else 0.99 * self.mean + 0.01 * step.loss
        values = {
            "loss/current": step.loss,
            "loss/average": self.mean,
            "lr/unet": step.lr,
            "lr/d": step.d,
            "grad_norm": step.grad_norm,
            **{f"lr/{name}": value for name, value in step.rates.items()},
        }
        tenths = (step.times * 10).long().clamp(0, 9)
        for tenth in tenths.unique().tolist():
            values[f"loss/t{tenth:02d}"] = step.losses[tenths == tenth].mean().item()
        self.write(step.step, values | dict(more))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def __enter__(self) -> Board:
        return self

    def __exit__(self, *error: object) -> None:
        self.writer.close()
