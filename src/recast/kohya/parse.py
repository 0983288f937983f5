"""Words to values: what the flags of a training command say, each read as its row has it.

As in sd-scripts: a config file's values hold where the command line is silent, a flag may be
shortened as long as it stays clear, and of a repeated flag the last one counts.
"""

from __future__ import annotations

import ntpath
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from recast.errors import Refused
from recast.kohya.flag import Flag
from recast.kohya.flags import FLAGS, LAUNCH, SCRIPTS
from recast.kohya.shell import is_script

MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Command:
    """A training command: what its flags say, and what `accelerate launch` was told before it."""

    script: str
    given: Mapping[str, Any]
    launch: Mapping[str, Any]


def read(words: Sequence[str]) -> Command:
    """Read the words of a command, and its config file where it names one.

    Raises Refused for another script, an unknown flag, and a value that is none.
    """
    place = next((k for k, word in enumerate(words) if is_script(word)), None)
    script = "" if place is None else ntpath.basename(words[place])
    if place is not None and script not in SCRIPTS:
        raise Refused(
            f"{script} is not among the scripts that recast kohya reads: "
            f"give a command of {' or '.join(SCRIPTS)}."
        )
    before = () if place is None else words[:place]
    launch = values(before[skipped(before) :], LAUNCH, "accelerate launch")
    given = values(words[0 if place is None else place + 1 :], FLAGS, script or "the command")
    config = given.get("config_file")
    if config is not None:
        given = {**from_file(Path(config)), **given}
    return Command(script, given, launch)


def skipped(words: Sequence[str]) -> int:
    """How many words come before the first flag: python, accelerate launch, -m and the like."""
    return next((k for k, word in enumerate(words) if word.startswith("--")), len(words))


def values(words: Sequence[str], table: Mapping[str, Flag], name: str) -> dict[str, Any]:
    """What flags say by name, in their order. Raises Refused for a word that belongs to none."""
    found: dict[str, Any] = {}
    for flag, texts in flagged(words, name):
        row = known(flag, table, name)
        found[row.name] = value(row, texts)
    return found


def flagged(words: Sequence[str], name: str) -> Iterator[tuple[str, list[str]]]:
    """Flags without their dashes, each with the words that follow it."""
    flag, texts = "", list[str]()
    for word in words:
        if word.startswith("--") and len(word) > 2:
            if flag:
                yield flag, texts
            flag, equals, rest = word[2:].partition("=")
            texts = [rest] if equals else []
        elif not flag:
            raise Refused(f"{name}: {word!r} follows no flag; flags begin with two dashes.")
        else:
            texts.append(word)
    if flag:
        yield flag, texts


def known(flag: str, table: Mapping[str, Flag], name: str) -> Flag:
    """A flag's row, also by a beginning that no other flag has."""
    flag = flag.replace("-", "_")
    if flag in table:
        return table[flag]
    longer = [row for row in table if row.startswith(flag)]
    if len(longer) == 1:
        return table[longer[0]]
    near = sorted(longer)[:3] or get_close_matches(flag, table, 1, 0.0)
    said = " or ".join(f"--{each}" for each in near)
    raise Refused(f"{name}: --{flag} is no flag that Recast knows; did you mean {said}?")


def value(row: Flag, texts: Sequence[str]) -> Any:
    """The words behind a flag as its kind of value."""
    if row.takes == "switch":
        if texts and texts[0].lower() in ("true", "false"):
            return texts[0].lower() == "true"  # forks declare some of them so
        if texts:
            raise Refused(f"--{row.name} takes no value, and {texts[0]!r} follows it.")
        return True
    if row.takes in MANY:
        return [read_one(row, MANY[row.takes], text) for text in texts]
    if len(texts) != 1:
        said = "nothing follows it" if not texts else f"{' '.join(texts)!r} follows it"
        raise Refused(f"--{row.name} takes one value, and {said}.")
    return read_one(row, ONE[row.takes], texts[0])


def share_or_whole(text: str) -> float:
    """A number of steps, or below 1 or with a % a share of them."""
    if text.endswith("%"):
        return float(text[:-1]) / 100
    number = float(text)
    return int(text) if number >= 1 else number


ONE: dict[str, Callable[[str], Any]] = {
    "word": str,
    "whole": int,
    "number": float,
    "share": share_or_whole,
}
MANY: dict[str, Callable[[str], Any]] = {"words": str, "numbers": float}
WANTED = {int: "a whole number", float: "a number", share_or_whole: "steps, or a share of them"}


def read_one(row: Flag, kind: Callable[[str], Any], text: str) -> Any:
    try:
        return kind(text)
    except ValueError as error:
        raise Refused(f"--{row.name} takes {WANTED[kind]}, not {text!r}.") from error


def from_file(path: Path) -> dict[str, Any]:
    """What a config file says; its tables only group the flags. Raises Refused as `read` does."""
    if path.suffix != ".toml":
        path = path.with_name(f"{path.name}.toml")
    found: dict[str, Any] = {}
    for key, said in flat(toml(path, "--config_file")):
        row = known(key, FLAGS, str(path))
        texts = [str(each) for each in (said if isinstance(said, list) else [said])]
        found[row.name] = value(row, texts)
    return found


def flat(table: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, said in table.items():
        if isinstance(said, dict):
            yield from said.items()
        else:
            yield key, said


def toml(path: Path, flag: str) -> dict[str, Any]:
    """A TOML file that a flag names."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise Refused(f"{flag}: {path} is too large for a file of settings.")
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise Refused(f"{flag}: {path} cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise Refused(f"{flag}: {path} is not valid TOML ({error}).") from error
