"""How the command line shows a run: a progress bar on a terminal, one line a minute elsewhere."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from recast import processes
from recast.events import Event, Measured, Note, Stage, Tick

OUT = Console()
ERR = Console(stderr=True)
QUIET_INTERVAL = 60.0  # seconds between progress lines when nobody watches


class _Rate(ProgressColumn):
    """Iterations per second, in the field's words."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.1f} it/s" if speed else "– it/s", style="cyan")


class _Loss(ProgressColumn):
    """Running mean of the loss, where the stage has one."""

    def render(self, task: Task) -> Text:
        loss = task.fields.get("loss")
        return Text("" if loss is None else f"loss {loss:.4f}", style="magenta")


def _bar() -> Progress:
    """Fits a terminal of 80 columns: stage, step, it/s, ETA, loss."""
    return Progress(
        TextColumn("{task.description:<17}"),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        _Rate(),
        TextColumn("ETA"),
        TimeRemainingColumn(compact=True),
        _Loss(),
        console=ERR,
    )


def follow(events: Iterable[Event]) -> None:
    """Run `events` to their end; the first process of a run shows what they say on stderr."""
    if not processes.first():
        for _ in events:
            pass
        return
    if ERR.is_terminal:
        _follow_bar(events)
    else:
        _follow_lines(events)


def _follow_bar(events: Iterable[Event]) -> None:
    with _bar() as progress:
        task, mean = None, None
        for event in events:
            if isinstance(event, Stage):
                mean = None
                task = progress.add_task(
                    event.name, total=event.total, completed=event.done, unit=event.unit
                )
            elif isinstance(event, Tick) and task is not None:
                mean = smooth(mean, event.loss)
                progress.update(task, completed=event.done, loss=mean)
            elif isinstance(event, Note):
                progress.console.print(event.text, style="yellow", markup=False, highlight=False)
            elif isinstance(event, Measured):
                progress.console.print(told(event), style="dim", markup=False, highlight=False)


def _follow_lines(events: Iterable[Event]) -> None:
    stage, mean, said, start = Stage("", 0), None, time.monotonic(), time.monotonic()
    for event in events:
        if isinstance(event, Stage):
            stage, mean, said, start = event, None, time.monotonic(), time.monotonic()
            ERR.print(f"{event.name}: {event.done}/{event.total} {event.unit}", highlight=False)
        elif isinstance(event, Note):
            ERR.print(event.text, markup=False, highlight=False)
        elif isinstance(event, Measured):
            ERR.print(told(event), markup=False, highlight=False)
        elif isinstance(event, Tick):
            mean = smooth(mean, event.loss)
            now = time.monotonic()
            if now - said >= QUIET_INTERVAL or event.done == stage.total:
                said, rate = now, (event.done - stage.done) / max(now - start, 1e-6)
                loss = "" if mean is None else f", loss {mean:.4f}"
                left = (stage.total - event.done) / max(rate, 1e-9)
                ERR.print(
                    f"{stage.name}: {event.done}/{stage.total} {stage.unit}, {rate:.1f}/s, "
                    f"ETA {left:.0f} s{loss}",
                    highlight=False,
                )


def told(event: Measured) -> str:
    """Figures of a run on one line."""
    values = ", ".join(f"{name} {value:.4g}" for name, value in event.figures.items())
    return f"step {event.step}: {values}"


def smooth(mean: float | None, value: float | None, decay: float = 0.95) -> float | None:
    """Exponential running mean; None stays None until a first value comes."""
    if value is None:
        return mean
    return value if mean is None else decay * mean + (1 - decay) * value


@contextmanager
def stoppable() -> Iterator[Callable[[], int]]:
    """Turn the first SIGINT or SIGTERM into a request; a second one leaves at once.

    Yields a function that returns the signal's number once a stop was asked for, else 0.
    """
    asked = 0

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise SystemExit(128 + number)
        asked = number
        if processes.first():
            # not through sys.stderr, which the main program may be in the middle of
            os.write(2, b"stopping after this step (again to leave at once)\n")

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, on_signal) for number in numbers}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def emit(value: Any) -> None:
    """Print a result as JSON on stdout, for scripts."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")
