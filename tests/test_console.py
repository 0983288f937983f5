"""Progress for people on stderr, results for programs on stdout, signals as requests."""

from __future__ import annotations

import io
import json
import os
import signal

import pytest
from rich.console import Console

from recast import console
from recast.events import Event, Measured, Note, Stage, Tick

EVENTS: list[Event] = [
    Note("a [bold]note[/bold] from a file name"),
    Stage("train", 3, "steps", 1),
    Tick(2, 0.5),
    Tick(3, 0.25),
    Stage("write", 1, "files"),
    Tick(1),
]


def test_a_log_gets_a_line_at_both_ends_of_a_stage(capsys: pytest.CaptureFixture[str]) -> None:
    console.follow(EVENTS)
    told = capsys.readouterr()
    assert told.out == ""
    lines = told.err.splitlines()
    assert lines[0] == "a [bold]note[/bold] from a file name"
    assert lines[1] == "train: 1/3 steps"
    assert lines[2].startswith("train: 3/3 steps, ")
    assert "ETA 0 s, loss 0.4875" in lines[2]
    assert lines[3] == "write: 0/1 files"
    assert "loss" not in lines[4]


@pytest.mark.parametrize("terminal", [True, False])
def test_figures_of_a_run_get_a_line(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    screened = Console(file=screen, force_terminal=terminal, width=80, color_system=None)
    monkeypatch.setattr(console, "ERR", screened)
    console.follow([Stage("train", 9), Tick(4), Measured(4, {"drift": 0.012345, "psnr": 31.0})])
    assert "step 4: drift 0.01235, psnr 31" in screen.getvalue()


def test_a_log_gets_a_line_a_minute(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(range(0, 10_000, 25))
    monkeypatch.setattr(console.time, "monotonic", lambda: float(next(now)))
    console.follow([Stage("train", 99), *(Tick(k) for k in range(1, 9))])
    said = [line.split(",")[0] for line in capsys.readouterr().err.splitlines()]
    assert said[0] == "train: 0/99 it"
    assert 2 <= len(said) <= 5


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(
        console, "ERR", Console(file=screen, force_terminal=True, width=80, color_system=None)
    )
    console.follow(EVENTS)
    shown = screen.getvalue()
    for word in ("train", "3/3", "it/s", "ETA", "loss 0.4875", "[bold]note"):
        assert word in shown


def test_a_failure_passes_through_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(console, "ERR", Console(file=screen, force_terminal=True))

    def failing() -> object:
        yield Stage("train", 2)
        raise ValueError("step 1")

    with pytest.raises(ValueError, match="step 1"):
        console.follow(failing())  # type: ignore[arg-type]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_leaves(number: int) -> None:
    before = signal.getsignal(number)
    with console.stoppable() as stopped:
        assert stopped() == 0
        os.kill(os.getpid(), number)
        assert stopped() == number
        with pytest.raises(SystemExit) as end:
            os.kill(os.getpid(), number)
        assert end.value.code == 128 + number
    assert signal.getsignal(number) is before


def test_json_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    value = {"text": "snø [red] ünd " + "x" * 500, "none": None, "list": [1, 2.5]}
    console.emit(value)
    told = capsys.readouterr()
    assert json.loads(told.out) == value
    assert "snø" in told.out
    assert told.err == ""
