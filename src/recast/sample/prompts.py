"""Prompts files, one picture a line, in the grammar of kohya's training scripts.

# a comment; empty lines are skipped too
a red kite over dunes
a red kite over dunes --n blurry --w 832 --h 1216 --d 7 --l 5.5 --s 28 --ss euler --fs 3

--n negative prompt    --w --h width, height    --d seed          --s steps
--l guidance scale     --ss sampler             --fs flow shift   --g embedded guidance
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recast.errors import Refused


@dataclass(frozen=True)
class Prompt:
    """A prompt and what its line says about the picture; None is for the caller to fill in.

    `guidance` is the input of guidance-distilled models, read so that files made for those stay
    valid; Stable Diffusion has no such input.
    """

    text: str
    negative: str | None = None
    width: int | None = None
    height: int | None = None
    seed: int | None = None
    scale: float | None = None
    guidance: float | None = None
    steps: int | None = None
    solver: str | None = None
    shift: float | None = None

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width), where the line names at least one of them; a square if only one."""
        height, width = self.height or self.width, self.width or self.height
        return (height, width) if height and width else None


OPTIONS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "n": ("negative", str),
    "w": ("width", int),
    "h": ("height", int),
    "d": ("seed", int),
    "l": ("scale", float),
    "g": ("guidance", float),
    "s": ("steps", int),
    "ss": ("solver", str),
    "fs": ("shift", float),
}

KOHYA_SOLVERS = {
    "k_euler": "euler",
    "euler_a": "euler_ancestral",
    "k_euler_a": "euler_ancestral",
    "dpmsolver++": "dpmpp_2m",
}


def parse_prompt(line: str, where: str = "prompt") -> Prompt:
    """One line. Raises Refused, beginning with `where`, for an unknown option or a bad value."""
    text, *options = re.split(r"(?:^|\s+)--(?=\w)", line.strip())
    found: dict[str, Any] = {}
    for option in options:
        letter, _, value = option.partition(" ")
        if letter.lower() not in OPTIONS:
            known = " ".join(f"--{each}" for each in OPTIONS)
            raise Refused(f"{where}: unknown option --{letter}; the options are {known}")
        name, kind = OPTIONS[letter.lower()]
        try:
            found[name] = kind(value.strip())
        except ValueError as error:
            raise Refused(f"{where}: --{letter} needs a number, not {value.strip()!r}") from error
    if "solver" in found:
        found["solver"] = KOHYA_SOLVERS.get(found["solver"], found["solver"])
    return Prompt(text.strip(), **found)


def parse_prompts(lines: Iterable[str], name: str = "prompts") -> list[Prompt]:
    """All prompts of a file's lines; Refused names file and line."""
    return [
        parse_prompt(line, f"{name}, line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip() and not line.lstrip().startswith("#")
    ]


def read_prompts(path: str | Path) -> list[Prompt]:
    """A prompts file (UTF-8). Raises Refused if it is absent, not text, or has no prompt."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"{path}: cannot be read as a UTF-8 prompts file ({error})") from error
    prompts = parse_prompts(lines, str(path))
    if not prompts:
        raise Refused(f"{path}: has no prompt; write one a line")
    return prompts
