"""The training stage: an attached adapter and a material of draws in, a trained adapter out."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from recast.convert.folder import Stopped
from recast.events import Event, Note, Stage, Tick
from recast.objective import Net, Objective
from recast.optim import averaged, build
from recast.recipe import Recipe
from recast.train import (
    DISTANCES,
    SCHEDULES,
    Draw,
    Ema,
    Step,
    Target,
    append,
    checked,
    criterion,
    from_data,
    from_teacher,
    latest,
    load,
    log_length,
    mix,
    open_log,
    save,
    train,
    warmup,
)
from recast.weighting import WEIGHTINGS

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from recast.adapter import Adapter, Attached
    from recast.convert.material import Material
    from recast.model import Model

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

    Returns the trained adapter. Raises Diverged when steps stop being finite, Stopped on a signal.
    """
    how = recipe.train
    parameters = attached.named()
    optimizer = build(how.optimizer, parameters.values(), lr=how.lr, **how.optimizer_args)
    ema = Ema(list(parameters.values()), how.ema) if how.ema else None
    done, skipped, length = 0, 0, 0
    if found := latest(root / "state"):
        for path in found.damaged:
            yield Note(f"{path} is damaged and passed over; going on from step {found.step}.")
        done, extra = load(
            found.path, parameters=parameters, optimizer=optimizer, ema=ema,
            identity={"run": identity},
        )  # fmt: skip
        skipped, length = extra["skipped"], extra["log"]
    yield Stage("train", how.limit, "steps", done)
    steps = train(
        student(model, objective),
        checked(material.draws(done), objective),
        criterion(
            target_of(recipe, model, attached, objective),
            objective,
            DISTANCES[how.distance],
            None if how.weighting == "uniform" else WEIGHTINGS[how.weighting](),
        ),
        optimizer,
        accumulate=how.accumulate,
        clip=how.clip or None,
        schedule=schedule(recipe),
        ema=ema,
        done=done,
        skipped=skipped,
    )
    with ExitStack() as stack:
        log = stack.enter_context(open_log(root / "log.jsonl", length))
        board = stack.enter_context(Board(root / "tb", done))
        for step in steps if done < how.limit else ():
            append(log, record(step))
            board.add(step)
            yield Tick(step.step, step.loss)
            signal = stopped()
            # what a step that was skipped leaves may be lost already: older states stay
            due = step.step % how.checkpoint_every == 0 and not step.skipped
            if signal or due or step.step == how.limit:
                save(
                    root / "state", step=step.step, parameters=parameters, optimizer=optimizer,
                    ema=ema, identity={"run": identity},
                    extra={"skipped": step.skipped, "log": log_length(log)},
                )  # fmt: skip
            if signal:
                raise Stopped(
                    signal, f"stopped after step {step.step}; the same command goes on there."
                )
    return shown(attached, optimizer, ema)


def precision(recipe: Recipe, device: str) -> torch.dtype:
    """The dtype of the frozen network; masters and losses are fp32 whatever it is."""
    name = recipe.train.precision
    if name == "auto":
        return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    return PRECISION[name]


def shown(attached: Attached, optimizer: Optimizer, ema: Ema | None) -> Adapter:
    """What training ended with: averaged weights where the optimizer or the recipe keeps them."""
    if ema is not None:
        with ema.shown():
            return attached.trained()
    with averaged(optimizer):
        return attached.trained()


def student(model: Model, objective: Objective) -> Callable[[Draw], Tensor]:
    """The network as it is being trained, told the times of the new objective's path."""

    def answer(draw: Draw) -> Tensor:
        return model.net(draw.condition, objective)(draw.x, draw.t)

    return answer


def target_of(recipe: Recipe, model: Model, attached: Attached, objective: Objective) -> Target:
    """The recipe's target: the data, the original in the same network, or a mix of the two."""

    def original(condition: Any) -> Net:
        net = model.net(condition)

        def answer(x: Tensor, t: Tensor) -> Tensor:
            with attached.teacher():
                return net(x, t)

        return answer

    data = from_data(objective)
    teacher = from_teacher(
        original, model.objective, objective, above=recipe.target.above,
        control=recipe.target.control,
    )  # fmt: skip
    share = recipe.target.mix
    return {
        "data": data,
        "teacher": teacher,
        "mix": mix(
            (data, lambda t: torch.full_like(t, share)),
            (teacher, lambda t: torch.full_like(t, 1 - share)),
        ),
    }[recipe.target.teacher]


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

    def add(self, step: Step) -> None:
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
        for name, value in values.items():
            self.writer.add_scalar(name, value, step.step)

    def __enter__(self) -> Board:
        return self

    def __exit__(self, *error: object) -> None:
        self.writer.close()
