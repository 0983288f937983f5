"""What a training run holds beside the network, and its state on disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from recast.convert.beside import Beside
from recast.convert.groups import groups
from recast.convert.watch import Looked, Watch
from recast.events import Note
from recast.objective import Objective
from recast.optim import averaged, build
from recast.recipe import Recipe
from recast.train import Ema, Step, latest, load, log_length, save

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from recast.adapter import Attached
    from recast.model import Model


@dataclass
class Course:
    """Masters by name and all that changes with them; `length` is that of the log so far."""

    recipe: Recipe
    root: Path
    identity: str
    parameters: dict[str, nn.Parameter]
    optimizer: Optimizer
    ema: Ema | None
    beside: Beside
    watch: Watch
    done: int = 0
    skipped: int = 0
    length: int = 0

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
        parameters, grouped = groups(attached, model.layout, recipe)
        return cls(
            recipe,
            root,
            identity,
            parameters,
            build(how.optimizer, grouped, lr=how.lr, **how.optimizer_args),
            Ema(list(parameters.values()), how.ema) if how.ema else None,
            Beside.of(recipe, model.device),
            Watch.open(recipe, model, objective, root),
        )

    def resume(self) -> Iterator[Note]:
        """Go on from the newest whole state, if there is any."""
        if not (found := latest(self.root / "state")):
            return
        for path in found.damaged:
            yield Note(f"{path} is damaged and passed over; going on from step {found.step}.")
        self.done, extra = load(found.path, **self.held())
        self.skipped, self.length = extra["skipped"], extra["log"]
        self.beside.restore(extra)
        self.watch.restore(extra["watch"])

    def save(self, step: Step, log: IO[bytes]) -> None:
        """Save the state after a step."""
        extra = {"skipped": step.skipped, "log": log_length(log), "watch": self.watch.saved()}
        save(
            self.root / "state", step=step.step, extra={**extra, **self.beside.state()},
            keep=self.watch.keep(), **self.held(),
        )  # fmt: skip

    def held(self) -> dict[str, Any]:
        """What a state is made of."""
        return {
            "parameters": self.parameters,
            "optimizer": self.optimizer,
            "ema": self.ema,
            "identity": {"run": self.identity},
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
