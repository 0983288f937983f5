"""The words of a command line that somebody wrote for sd-scripts, as a shell would see them.

A file may be a .bat with `^` at its line ends, a .sh with backslashes, a PowerShell script with
backticks, or a line pasted into a .txt. Backslashes inside words are kept, since most are of
Windows paths. Variables are those that the file itself sets.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from recast.errors import Refused

CONTINUED = "^`\\"  # what ends a line that goes on, the least doubtful first
ENDS = {"&&", "||", "&", "|", ";", ">", ">>", "2>&1"}
REMARK = re.compile(r"\s*(#|::|@?rem\b)", re.IGNORECASE)
SET = re.compile(
    r"""\s*(?:set\s+"?|export\s+|\$(?:env:)?)?(?P<name>[A-Za-z_]\w*)\s?=\s?(?P<value>.*?)\s*$""",
    re.IGNORECASE,
)
NAMED = re.compile(r"%(\w+)%|\$env:(\w+)|\$\{(\w+)\}|\$(\w+)")
MAX_BYTES = 1 << 20


def read_command(path: Path) -> tuple[str, ...]:
    """The words of the one training command in a file.

    Raises Refused for a file that cannot be read, and for none or several commands in it.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise Refused(f"{path} is too large for a command line: give the file that holds it.")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise Refused(f"{path} cannot be read: {reason}.") from error
    found = list(commands(text, str(path)))
    if len(found) != 1:
        count = "no training command" if not found else f"{len(found)} training commands"
        raise Refused(
            f"{path} holds {count}: give a file with one `accelerate launch … train_network.py …`."
        )
    return found[0]


def commands(text: str, name: str = "the command") -> Iterator[tuple[str, ...]]:
    """Every training command of a script; or the whole text, where it is flags alone."""
    ends = {line.rstrip()[-1:] for line in text.splitlines() if not REMARK.match(line)}
    mark = next((each for each in CONTINUED if each in ends), "")
    values: dict[str, str] = {}
    for line in lines(text, mark):
        if REMARK.match(line):
            continue
        if assigned := assignment(line):
            values[assigned[0]] = expanded(assigned[1], values, name)
            continue
        found = cut(split(line, mark))
        if is_training(found):
            yield cut(split(expanded(line, values, name), mark))


def is_training(words: Sequence[str]) -> bool:
    """Whether words start a training script, or are the flags of one."""
    return any(map(is_script, words)) or (bool(words) and words[0].startswith("--"))


def is_script(word: str) -> bool:
    """Whether a word names a script that trains."""
    name = re.split(r"[/\\]", word)[-1].lower()
    return name.endswith(".py") and "train" in name


def lines(text: str, mark: str) -> Iterator[str]:
    """Lines as the shell sees them: those that end in the mark go on in the next."""
    held = ""
    for line in text.splitlines():
        bare = line.rstrip()
        if mark and bare.endswith(mark) and not (not held and REMARK.match(bare)):
            held += bare[:-1] + " "
            continue
        yield held + line
        held = ""
    if held:
        yield held


def assignment(line: str) -> tuple[str, str] | None:
    """(name, value) of a line that sets a variable and does nothing else."""
    found = SET.match(line)
    if not found or is_training(split(line)):
        return None
    value = found["value"]
    if line.lstrip().lower().startswith('set "'):
        value = value.removesuffix('"')
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "\"'"
    return found["name"], value[1:-1] if quoted else value


def expanded(line: str, values: dict[str, str], name: str) -> str:
    """The line with the file's own variables put in."""

    def value(found: re.Match[str]) -> str:
        key = next(group for group in found.groups() if group)
        if key not in values:
            raise Refused(f"{name} uses {found[0]}, which it does not set: write its value there.")
        return values[key]

    return NAMED.sub(value, line)


def split(line: str, mark: str = "") -> tuple[str, ...]:
    """Words of a line; quotes group, and in cmd (mark `^`) double quotes alone do."""
    quotes = '"' if mark == "^" else "\"'"
    found: list[str] = []
    word, inside, started, k = "", "", False, 0
    while k < len(line):
        here = line[k]
        if escapes(line, k, mark, inside, word):
            k += 1
            word, started = word + line[k], True
        elif inside:
            word, inside = (word, "") if here == inside else (word + here, inside)
        elif here in quotes:
            inside, started = here, True
        elif here.isspace():
            found += [word] if started else []
            word, started = "", False
        elif here != "^" or mark != "^":
            word, started = word + here, True
        k += 1
    if inside:
        raise Refused(f"a quote {inside} is opened and not closed in: {line.strip()[:80]}")
    return (*found, word) if started else tuple(found)


def escapes(line: str, place: int, mark: str, inside: str, word: str) -> bool:
    """Whether a backslash stands there that means the quote, or the blank, behind it."""
    if line[place] != "\\":
        return False
    after = line[place + 1 : place + 2]
    blank = after == " " and mark == "\\" and not inside and not windows(word)
    return blank or (after == '"' and not closes(line, place + 1, inside))


def closes(line: str, place: int, inside: str) -> bool:
    r"""Whether the quote at `place`, behind a backslash, ends a path such as "C:\out\"."""
    rest = line[place + 1 :]
    return inside == '"' and (not rest or rest[0].isspace()) and rest.count('"') % 2 == 0


def windows(word: str) -> bool:
    r"""Whether a word, or what follows its `=`, begins as a Windows path does: C:\ or \\."""
    return bool(re.match(r"(?:--\w+=)?(?:[A-Za-z]:\\|\\\\)", word))


def cut(words: tuple[str, ...]) -> tuple[str, ...]:
    """The part of a line that is the training's, of several commands behind one another."""
    parts: list[list[str]] = [[]]
    for word in words:
        if word in ENDS:
            parts.append([])
        else:
            parts[-1].append(word)
    return tuple(next((part for part in parts if is_training(part)), parts[0]))
