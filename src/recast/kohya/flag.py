"""One row of the flag table: a flag of sd-scripts, how its value reads, and what becomes of it.

A turn is what a flag's value becomes: settings of a recipe, something that the run is told (its
model, images, folder), nothing, with the reason why, or a refusal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from recast.errors import Refused

Given = Mapping[str, Any]
"""What all flags of a command say, by name; flags that were not given are absent."""

Settings = dict[str, Any]
"""Recipe keys, dotted, and what the run is told (`MODEL`, `IMAGES`, `OUT`), with their values."""


class Idle(str):
    """Why a flag's value changes nothing."""


Outcome = Settings | Idle


@dataclass(frozen=True)
class Turn:
    """What a flag becomes: in words for the table, and for a value among the others given."""

    becomes: tuple[str, ...]
    kind: Literal["kept", "idle", "refused"]
    apply: Callable[[Any, Given], Outcome]
    why: str = ""

    @property
    def says(self) -> str:
        """What stands in the table's second column."""
        named = ", ".join(f"`{each}`" for each in self.becomes)
        return {"kept": named, "idle": "no effect", "refused": "refused"}[self.kind]


@dataclass(frozen=True)
class Flag:
    """A flag of sd-scripts; `about` is the remark of its row in docs/kohya.md."""

    name: str
    takes: Literal["switch", "word", "words", "whole", "number", "numbers", "share"]
    turn: Turn
    about: str = ""

    @property
    def remark(self) -> str:
        """What stands in the table's third column: the reason, or what is worth knowing."""
        return self.turn.why or self.about


def key(name: str, change: Callable[[Any], Any] = lambda value: value) -> Turn:
    """One recipe key with the value as it is, or changed."""
    return Turn((name,), "kept", lambda value, given: {name: change(value)})


def told(name: str) -> Turn:
    """Something that the run is told beside the recipe."""
    return key(name)


def choice(name: str, meanings: Mapping[str, str]) -> Turn:
    """One recipe key whose names differ; any other value is refused."""

    def apply(value: Any, given: Given) -> Outcome:
        if value not in meanings:
            only = " and ".join(meanings)
            raise Refused(f"{{flag}} {value} has no equivalent here, only {only}.")
        return {name: meanings[value]}

    return Turn((name,), "kept", apply)


def on(**settings: Any) -> Turn:
    """Settings that a switch makes (`train__shift` stands for `train.shift`)."""
    wanted = {name.replace("__", "."): value for name, value in settings.items()}
    return Turn(
        tuple(wanted), "kept", lambda value, given: wanted if value else Idle("it is off already")
    )


def through(function: Callable[[Any, Given], Outcome], *becomes: str) -> Turn:
    """What a function makes of the value and the other flags."""
    return Turn(becomes, "kept" if becomes else "idle", function)


def idle(why: str) -> Turn:
    """Nothing, whatever the value is."""
    return Turn((), "idle", lambda value, given: Idle(why), why)


def refused(why: str, *harmless: Any) -> Turn:
    """A refusal, except for values that ask for nothing."""

    def apply(value: Any, given: Given) -> Outcome:
        if value in (False, None, *harmless):
            return Idle("this value asks for nothing")
        raise Refused(f"{{flag}} cannot be honoured: {why}.")

    asks = [str(value) for value in harmless if value not in (False, None)]
    but = f"; {' and '.join(asks)} ask for nothing" if len(asks) > 1 else ""
    but = but or (f"; {asks[0]} asks for nothing" if asks else "")
    return Turn((), "refused", apply, why + but)


def settled(row: Flag, value: Any, given: Given, name: str) -> Settings:
    """What a row makes of a value, {} for nothing; a refusal names the flag."""
    outcome = turned(row, value, given, name)
    return {} if isinstance(outcome, Idle) else outcome


def turned(row: Flag, value: Any, given: Given, name: str) -> Outcome:
    """What a row makes of a value, with the reason for nothing; a refusal names the flag."""
    try:
        return row.turn.apply(value, given)
    except (TypeError, ValueError) as error:
        raise Refused(f"{name} takes a number, not {value!r}.") from error
    except Refused as error:
        raise Refused(str(error).replace("{flag}", name)) from error
