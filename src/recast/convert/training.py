"""The training stage: an attached adapter and a material of draws in, a trained adapter out."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from recast.convert.beside import Beside
from recast.convert.folder import Stopped
from recast.convert.groups import groups
from recast.convert.losses import loss_of
from recast.convert.trunk import Trunk, shared
from recast.convert.watch import Looked, Watch
from recast.events import Event, Note, Stage, Tick
from recast.objective import Net, Objective
from recast.optim import averaged, build
from recast.recipe import Recipe
from recast.timesteps import piecewise
from recast.train import (
    SCHEDULES,
    Draw,
    Ema,
    Step,
    Target,
    append,
    checked,
    from_data,
    from_teacher,
    guided,
    latest,
    load,
    log_length,
    mix,
    open_log,
    save,
    train,
    warmup,
)

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from recast.adapter import Adapter, Attached
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
) -> Generator[Event, None, Adapter]:
    """Train until the recipe's last step, resuming from the newest whole state below `root`.

    Returns the trained adapter. Raises Diverged when steps stop being finite or the run collapses,
    Stopped on a signal.
    """
    how = recipe.train
    parameters, grouped = groups(attached, model.layout, recipe)
    optimizer = build(how.optimizer, grouped, lr=how.lr, **how.optimizer_args)
    beside = Beside.of(recipe, model.device)
    trunk = shared(model.unet, attached, model.objective, objective)
    ema = Ema(list(parameters.values()), how.ema) if how.ema else None
    watch = Watch.open(recipe, model, objective, root)
    done, skipped, length = 0, 0, 0
    if found := latest(root / "state"):
        for path in found.damaged:
            yield Note(f"{path} is damaged and passed over; going on from step {found.step}.")
        done, extra = load(
            found.path, parameters=parameters, optimizer=optimizer, ema=ema,
            identity={"run": identity},
        )  # fmt: skip
        skipped, length = extra["skipped"], extra["log"]
        beside.restore(extra)
        watch.restore(extra["watch"])
    untrained = None if watch.readings else watch.look(0)
    yield Stage("train", watch.end, "steps", done)
    steps = train(
        student(model, objective, trunk),
        checked(material.draws(done, beside.aware), objective),
        loss_of(
            recipe,
            target_of(recipe, model, attached, objective, material.null(), trunk),
            objective,
            beside.learned,
        ),
        optimizer,
        accumulate=how.accumulate,
        clip=how.clip or None,
        schedule=schedule(recipe) if watch.pace is None else watch.factor,
        ema=ema,
        done=done,
        skipped=skipped,
        partner=beside.partner,
    )
    with ExitStack() as stack:
        log = stack.enter_context(open_log(root / "log.jsonl", length))
        board = stack.enter_context(Board(root / "tb", done))
        if untrained is not None:
            board.write(0, untrained.scalars)
        for step in steps if done < watch.end else ():
            beside.update(step)
            looked = Looked()
            if watch.due(step.step):
                with weights_shown(optimizer, ema):
                    looked = watch.look(step.step)
            begun = {"untrained": untrained.record} if untrained and step.step == 1 else {}
            append(log, record(step) | begun | looked.record)
            board.add(step, looked.scalars)
            yield Tick(step.step, step.loss)
            yield from looked.events
            watch.check(step.step)
            signal = stopped()
            # what a step that was skipped leaves may be lost already: older states stay
            due = step.step % how.checkpoint_every == 0 and not step.skipped
            if signal or due or step.step == watch.end:
                save(
                    root / "state", step=step.step, parameters=parameters, optimizer=optimizer,
                    ema=ema, identity={"run": identity},
                    extra={
                        "skipped": step.skipped, "log": log_length(log), "watch": watch.saved(),
                        **beside.state(),
                    },
                    keep=watch.keep(),
                )  # fmt: skip
            if signal:
                raise Stopped(
                    signal, f"stopped after step {step.step}; the same command goes on there."
                )
            if step.step == watch.end:
                break
    with weights_shown(optimizer, ema):
        return attached.trained()


def precision(recipe: Recipe, device: str) -> torch.dtype:
    """The dtype of the frozen network; masters and losses are fp32 whatever it is."""
    name = recipe.train.precision
    if name == "auto":
        return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    return PRECISION[name]


@contextmanager
def weights_shown(optimizer: Optimizer, ema: Ema | None) -> Iterator[None]:
    """Inside, the weights are the result's: averages, if the optimizer or the recipe keeps them."""
    with averaged(optimizer) if ema is None else ema.shown():
        yield


def student(
    model: Model, objective: Objective, trunk: Trunk | None = None
) -> Callable[[Draw], Tensor]:
    """The network as it is being trained, told the times of the new objective's path."""

    def answer(draw: Draw) -> Tensor:
        known = trunk.answer(draw.x, draw.condition) if trunk else None
        return model.net(draw.condition, objective)(draw.x, draw.t) if known is None else known

    return answer


def target_of(
    recipe: Recipe,
    model: Model,
    attached: Attached,
    objective: Objective,
    null: Condition,
    trunk: Trunk | None = None,
) -> Target:
    """The recipe's target: the data, the original in the same network, or a mix of the two.

    `null` is the condition without a prompt, one row; guidance of the original leans on it.
    """
    how = recipe.target

    def original(condition: Any) -> Net:
        net = model.net(condition)

        def answer(x: Tensor, t: Tensor) -> Tensor:
            with attached.teacher(), trunk.recorded(x, condition) if trunk else nullcontext():
                return net(x, t)

        return answer

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
    plain = SCHEDULES[how.schedule](max(1, how.limit - how.warmup))
    return warmup(plain, how.warmup) if how.warmup else plain


def record(step: Step) -> dict[str, Any]:
    """A step as a line of `log.jsonl`; `t` and `losses` are per sample."""
    return {
        "step": step.step,
        "loss": step.loss,
        "grad_norm": step.grad_norm,
        "lr": step.lr,
        "d": step.d,
        "skipped": step.skipped,
        "t": [round(value, 5) for value in step.times.tolist()],
        "losses": [float(f"{value:.5g}") for value in step.losses.tolist()],
    }


class Board:
    """TensorBoard events under kohya's names, plus the loss per tenth of the path."""

    def __init__(self, folder: Path, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=done + 1 if done else None)
        self.mean: float | None = None

    def add(self, step: Step, more: Mapping[str, float]) -> None:
        self.mean = step.loss if self.mean is None else 0.99 * self.mean + 0.01 * step.loss
        values = {
            "loss/current": step.loss,
            "loss/average": self.mean,
            "lr/unet": step.lr,
            "lr/d": step.d,
            "grad_norm": step.grad_norm,
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
