"""What a training run holds beside the network, and its state on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import monotonic
from typing import IO, TYPE_CHECKING, Any

import torch

from recast import processes
from recast.convert.beside import Beside
from recast.convert.groups import groups
from recast.convert.watch import Looked, Watch
from recast.errors import NotFinite
from recast.events import Note
from recast.objective import Objective
from recast.optim import ONE_RATE, OPTIMIZERS, averaged, build
from recast.recipe import Recipe
from recast.train import Ema, Step, latest, load, log_length, plainly, rounding, save
from recast.train.state import prune

if TYPE_CHECKING:
    from torch import nn
    from torch.amp import GradScaler
    from torch.optim import Optimizer

    from recast.adapter import Attached
    from recast.model import Model
    from recast.train.shards import Shards


LOWER = 0.5  # what a rollback leaves of the rate


@dataclass
class Course:
    """Masters by name and all that changes with them; `length` is that of the log so far.

    Of `shards` the masters are this process's rows. `rolled` says why the run went back to an
    earlier state, until that is logged.
    """

    recipe: Recipe
    root: Path
    identity: str
    parameters: dict[str, nn.Parameter]
    optimizer: Optimizer
    ema: Ema | None
    beside: Beside
    watch: Watch
    scaler: GradScaler | None = None
    done: int = 0
    skipped: int = 0
    length: int = 0
    seconds: float = 0.0
    rollbacks: int = 0
    rolled: dict[str, Any] | None = None
    shards: Shards | None = None

    @classmethod
    def begun(
        cls,
        model: Model,
        attached: Attached,
        recipe: Recipe,
        objective: Objective,
        root: Path,
        identity: str,
    ) -> Course:
        """The recipe's optimizer and what goes with it, before the first step."""
        how = recipe.train
        torch.manual_seed(how.seed)  # of dropouts and roundings; a state brings its own
        parameters, grouped = groups(attached, model.layout, recipe)
        for parameter in parameters.values() if how.masters == "bf16" else ():
            parameter.data = parameter.data.bfloat16()
        shards = None
        if processes.sharing():
            from recast.train.shards import Shards

            shards = Shards.of(parameters)
            parameters, grouped = dict(shards.rows), shards.grouped(grouped)
        return cls(
            recipe,
            root,
            identity,
            parameters,
            build(how.optimizer, grouped, lr=how.lr, **how.optimizer_args),
            Ema(list(parameters.values()), how.ema) if how.ema else None,
            Beside.of(recipe, model.device),
            Watch.open(recipe, model, objective, root),
            torch.amp.GradScaler(model.device.type) if model.dtype == torch.float16 else None,
            shards=shards,
        )

    def resume(self) -> Iterator[Note]:
        """Go on from the newest whole state, if there is any, and prune what a kill left."""
        if not (found := latest(self.root / "state")):
            return
        for path in found.damaged:
            yield Note(f"{path} is damaged and passed over; going on from step {found.step}.")
        self.done, extra = load(found.path, **self.held())
        self.skipped, self.length = extra["skipped"], extra["log"]
        self.seconds, self.rollbacks = extra["seconds"], extra["rollbacks"]
        if self.scaler is not None:
            self.scaler.load_state_dict(extra["scaler"])
        self.beside.restore(extra)
        self.watch.restore(extra["watch"])
        self.watch.cut = extra["cut"]
        if processes.first():
            # a kill between a state's commit and its pruning; here nothing is about to be added
            prune(self.root / "state", max(2, self.watch.keep() - 1))

    def save(self, step: Step, log: IO[bytes] | None) -> None:
        """Save the state after a step; without a log a process takes part in that only."""
        extra = {
            "skipped": step.skipped, "log": log_length(log) if log else 0,
            "watch": self.watch.saved(),
            "seconds": self.seconds, "rollbacks": self.rollbacks, "cut": self.watch.cut,
            **({} if self.scaler is None else {"scaler": self.scaler.state_dict()}),
        }  # fmt: skip
        save(
            self.root / "state", step=step.step, extra={**extra, **self.beside.state()},
            keep=self.watch.keep() if log else 2, **self.held(),
        )  # fmt: skip

    def rolled_back(
        self, error: NotFinite, model: Model, attached: Attached, objective: Objective
    ) -> Course:
        """The course as its newest state has it, or its beginning, at a lower rate.

        Raises NotFinite once the recipe's rollbacks are used up.
        """
        if self.rollbacks >= self.recipe.train.rollbacks:
            if not self.rollbacks:
                raise error
            raise NotFinite(
                f"{error}: it went back to an earlier state already and on at {self.factor:g} of "
                "train.lr; the last state is kept, give another train.lr and --out"
            ) from error
        self.optimizer.state.clear()  # these moments leave before others come
        attached.restart()
        fresh = Course.begun(model, attached, self.recipe, objective, self.root, self.identity)
        for _ in fresh.resume():  # what is damaged has been told
            pass
        fresh.rollbacks = self.rollbacks + 1
        fresh.rolled = {"why": str(error), "to": fresh.done, "factor": fresh.factor}
        return fresh

    @property
    def factor(self) -> float:
        """What is left of the recipe's rate."""
        return LOWER**self.rollbacks

    @property
    def move(self) -> Callable[[Optimizer], None]:
        """How the optimizer steps; schedule-free ones round bf16 by themselves."""
        how = self.recipe.train
        if how.masters == "fp32" or hasattr(self.optimizer, "eval"):
            return plainly
        alone = how.optimizer in OPTIMIZERS and how.optimizer not in ONE_RATE
        return partial(rounding.move, together=not alone)

    def timed(self, steps: Iterator[Step]) -> Iterator[Step]:
        """The same steps; the run's end is cut to the one after which its minutes are over."""
        how = self.recipe.train
        since = monotonic()
        for step in steps:
            now = monotonic()
            self.seconds, since = self.seconds + now - since, now
            late = how.max_minutes and self.seconds >= 60 * how.max_minutes
            if late and how.min_steps <= step.step < self.watch.end:
                self.watch.cut = step.step
            yield step

    def told(self) -> dict[str, Any]:
        """For the log: what is left of the rate where that is less, and, once, why."""
        if not self.rollbacks:
            return {}
        why, self.rolled = self.rolled, None
        return {"factor": self.factor, **({"rolled_back": why} if why else {})}

    def held(self) -> dict[str, Any]:
        """What a state is made of."""
        return {
            "parameters": self.parameters,
            "optimizer": self.optimizer,
            "ema": self.ema,
            "identity": {"run": self.identity},
            "shards": self.shards,
        }

    def due(self, step: Step) -> bool:
        """Whether a state is to be saved after a step.

        What a step that was skipped leaves may be lost already: older states stay.
        """
        due = step.step % self.recipe.train.checkpoint_every == 0 and not step.skipped
        return due or step.step == self.watch.end

    def look(self, step: Step) -> Looked:
        """Learn from a step what is learned beside; validate and paint where it is time to."""
        self.beside.update(step)
        if not self.watch.due(step.step):
            return Looked()
        with self.shown():
            return self.watch.look(step.step)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Inside, weights are the result's: averages, if the optimizer or the recipe keeps them."""
        with averaged(self.optimizer) if self.ema is None else self.ema.shown():
            yield
