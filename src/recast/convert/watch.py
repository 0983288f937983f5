"""What is looked at while a run trains: validation, previews, the alarm, the moment to stop.

All decisions are functions of the readings so far, which are saved with every state: a run that is
stopped and goes on decides as if it had never stopped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recast import processes
from recast.convert import prompted
from recast.convert.fixed import (
    FIXED,
    PREVIEWS,
    Originals,
    captions_of,
    paints,
    previews,
    read_originals,
    validates,
)
from recast.convert.networks import trains_text
from recast.convert.prompted import Line
from recast.convert.texts import now
from recast.errors import Diverged
from recast.evaluate.alarm import good, lost
from recast.evaluate.validation import Fixed, Reading, read, read_fixed
from recast.events import Event, Measured, Note, Stage
from recast.recipe import Recipe
from recast.train import latest
from recast.train.keep import forget, keep
from recast.train.plateau import Pace

if TYPE_CHECKING:
    from recast.model import Model
    from recast.objective import Objective


@dataclass(frozen=True)
class Looked:
    """What was found after a step: for the log, for TensorBoard, for the user."""

    record: dict[str, Any] = field(default_factory=dict)
    scalars: dict[str, float] = field(default_factory=dict)
    events: tuple[Event, ...] = ()


@dataclass
class Watch:
    """A run's readings, oldest first; the first one is the untrained network's.

    `cut` is the step at which the run's minutes were over.
    """

    recipe: Recipe
    model: Model
    objective: Objective
    root: Path
    fixed: Fixed | None
    originals: Originals | None
    readings: list[Reading] = field(default_factory=list)
    reads: bool = False
    captions: tuple[str, ...] = ()
    cut: int | None = None
    lines: tuple[Line, ...] = ()

    @classmethod
    def open(cls, recipe: Recipe, model: Model, objective: Objective, root: Path) -> Watch:
        """Read what was fixed before training."""
        fixed = read_fixed(root / FIXED) if validates(recipe) else None
        shown = read_originals(root / PREVIEWS) if previews(recipe) else None
        reads = trains_text(model.layout, recipe)
        captions = captions_of(root / FIXED) if fixed and reads else ()
        lines = prompted.read(root, recipe) if paints(recipe) and recipe.watch.prompts else ()
        return cls(
            recipe, model, objective, root, fixed, shown, reads=reads, captions=captions,
            lines=lines,
        )  # fmt: skip

    @property
    def pace(self) -> Pace | None:
        """The rule for the run's end, where the recipe leaves it open."""
        how = self.recipe.train
        if how.steps != "auto":
            return None
        return Pace(how.max_steps, self.recipe.watch.validate_every, how.schedule, how.warmup)

    @property
    def began(self) -> int | None:
        """The step at which the cool-down of an open run began."""
        drifts = [(r.step, r.drift) for r in self.readings[1:]]
        return self.pace.began(drifts) if self.pace else None

    @property
    def end(self) -> int:
        """The run's last step, as far as it is known."""
        if self.cut is not None:
            return self.cut
        return self.pace.end(self.began) if self.pace else self.recipe.train.limit

    def factor(self, done: int) -> float:
        """The factor of an open run's learning rate."""
        assert self.pace is not None
        return self.pace.factor(done, self.began)

    def due(self, step: int) -> bool:
        """Whether there is anything to look at after a step."""
        return self.validates(step) or self.paints(step)

    def validates(self, step: int) -> bool:
        return self.fixed is not None and due(step, self.recipe.watch.validate_every, self.end)

    def paints(self, step: int) -> bool:
        how = self.recipe.watch
        if self.originals is None and not self.lines:
            return False
        return due(step, how.previews_every, self.end) if step else how.previews_first

    def look(self, step: int) -> Looked:
        """Validate and paint if it is time for it; step 0 is the untrained network."""
        paints = self.paints(step)
        found = Looked()
        if self.validates(step) and self.fixed is not None:
            found = self.validate(step, self.fixed)
        if paints or self.paints(step):
            found = joined(found, self.preview(step))
        return found

    def validate(self, step: int, fixed: Fixed) -> Looked:
        """One reading, and what it means for the end of an open run."""
        before = self.began
        model, objective = self.model, self.objective
        if self.reads:
            fixed = replace(fixed, condition=now(model, self.captions, fixed.condition))
        reading = read(
            lambda bound: model.net(bound, objective), fixed, objective,
            model.decode if self.recipe.watch.alarm else None, model.device, step,
        )  # fmt: skip
        self.readings.append(reading)
        events: list[Event] = [Measured(step, {"drift": reading.drift, "data": reading.data})]
        if self.pace and before is None and self.began is not None:
            events.append(Note(f"The drift has stopped falling; the run ends at step {self.end}."))
            if self.end > step:
                events.append(Stage("cool down", self.end, "steps", step))
        return Looked({"validation": told(reading)}, scalars(reading), tuple(events))

    def check(self, step: int) -> None:
        """Raise Diverged for a run that has collapsed; the last good state is then the newest."""
        if self.fixed is None or not self.recipe.watch.alarm or self.readings[-1].step != step:
            return
        if gone := lost(self.readings, self.fixed, last=step == self.end):
            forget(self.root / "state", good(self.readings, self.fixed))
            found = latest(self.root / "state")
            kept = f"the state of step {found.step} is kept" if found else "no state was good yet"
            raise Diverged(
                f"collapse alarm at step {step}: {'; '.join(map(str, gone))} ({kept}): "
                "lower train.lr, or set watch.alarm to false, under another --out."
            )

    def keep(self) -> int:
        """How many states must be kept for the last good one to be among them."""
        if self.fixed is None or not self.recipe.watch.alarm:
            return 2
        return keep(self.root / "state", good(self.readings, self.fixed))

    def preview(self, step: int) -> Looked:
        """Paint with the new objective's sampler: a prompts file, or beside the original."""
        if self.originals is not None:
            return self.beside(step, self.originals)
        made = prompted.paint(self.model, self.objective, self.recipe, self.lines)
        if processes.first():
            prompted.write_previews(self.root, step, made)
        else:
            list(made)
        return Looked()

    def beside(self, step: int, originals: Originals) -> Looked:
        """Paint what the original painted, and compare."""
        from recast.convert.previews import judged, paint, write_sheet

        if self.reads:
            originals = reread(self.model, originals)
        made = paint(self.model, self.objective, self.recipe, originals)
        if not processes.first():
            return Looked()
        write_sheet(self.root, step, originals, made)
        values = judged(self.recipe, originals, made, str(self.model.device))
        return Looked(
            {"previews": values},
            {f"previews/{name}": value for name, value in values.items()},
            (Measured(step, values),),
        )

    def saved(self) -> list[dict[str, Any]]:
        """The readings for a state."""
        return [asdict(reading) for reading in self.readings]

    def restore(self, saved: Sequence[dict[str, Any]]) -> None:
        """Go on with the readings of a state."""
        self.readings = [Reading(**each) for each in saved]


def reread(model: Model, originals: Originals) -> Originals:
    """The prompts of previews as the text encoders read them now."""
    blank = [""] * len(originals.prompts)
    return replace(
        originals,
        condition=now(model, originals.prompts, originals.condition),
        negative=now(model, blank, originals.negative),
    )


def due(step: int, every: int, end: int) -> bool:
    """Every so often, and at the end."""
    return bool(every) and (step % every == 0 or step == end)


def told(reading: Reading) -> dict[str, Any]:
    """A reading as the log holds it."""
    return {
        "step": reading.step,
        "drift": reading.drift,
        "data": reading.data,
        "drift_by_level": [float(f"{drift:.5g}") for drift, _ in reading.levels],
        "data_by_level": [float(f"{data:.5g}") for _, data in reading.levels],
        **{name.replace(" ", "_"): value for name, value in reading.named.items()},
    }


def scalars(reading: Reading) -> dict[str, float]:
    """A reading as TensorBoard shows it."""
    values = {"drift/average": reading.drift, "validation/data": reading.data}
    for k, (drift, data) in enumerate(reading.levels):
        values |= {f"drift/t{k:02d}": drift, f"validation/t{k:02d}": data}
    values |= {f"collapse/{name}": value for name, value in reading.named.items()}
    return {name: value for name, value in values.items() if math.isfinite(value)}


def joined(one: Looked, other: Looked) -> Looked:
    return Looked(
        one.record | other.record, one.scalars | other.scalars, (*one.events, *other.events)
    )
