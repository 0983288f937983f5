"""A folder of pictures with captions beside them, as kohya's and OneTrainer's users keep them.

`x.png` has its caption in `x.txt` or `x.caption`, not both.  A subfolder named `10_name` is read
with 10 repeats, and `name` is the caption of its pictures that have none.  Hidden files are
passed over.  Nothing is decoded here: headers are read (sizes, formats), bodies when a picture is
first used.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from recast.data.images import SUFFIXES, header
from recast.errors import Refused

SIDECARS = (".txt", ".caption")
REPEATS = re.compile(r"(\d{1,6})_(.*)", re.DOTALL)
LISTED = 3


@dataclass(frozen=True, slots=True)
class Example:
    """One picture; `name` is its path inside `root`, `size` (width, height) when upright."""

    root: Path
    name: str
    caption: str
    repeats: int = 1
    size: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """Where the picture lies."""
        return self.root / self.name


@dataclass(frozen=True)
class Problem:
    """Something that keeps a picture from being used, in one sentence that names the file."""

    path: Path
    what: str


@dataclass(frozen=True)
class Folder:
    """What a scan found: usable examples by name, problems of the others."""

    root: Path
    examples: tuple[Example, ...]
    problems: tuple[Problem, ...] = ()

    @property
    def uncaptioned(self) -> int:
        """How many examples have the empty prompt for a caption."""
        return sum(not example.caption for example in self.examples)


def scan(
    folder: Path | str,
    *,
    on_broken: Literal["refuse", "skip"] = "refuse",
    recursive: bool = False,
    headers: bool = True,
) -> Folder:
    """Find the pictures of a folder and their captions; reads no pixels.

    `refuse` stops at the end of the scan naming the first problems, `skip` leaves those pictures
    out and lists them.  Raises Refused for a missing or empty folder, and where nothing usable is
    left.
    """
    root = Path(folder)
    if not root.is_dir():
        raise Refused(f"{root}: no such folder of images.")
    examples: list[Example] = []
    problems: list[Problem] = []
    for place, repeats, fallback in places(root, recursive):
        for found in read_place(root, place, repeats, fallback):
            (examples if isinstance(found, Example) else problems).append(found)  # type: ignore[arg-type]
    if headers:
        examples, broken = with_headers(examples)
        problems += broken
    if problems and (on_broken == "refuse" or not examples):
        raise Refused(summary(problems))
    if not examples:
        raise Refused(nothing(root, recursive))
    return Folder(root, tuple(examples), tuple(problems))


def places(root: Path, recursive: bool) -> Iterator[tuple[Path, int, str]]:
    """Yield folders to read, their repeats and fallback captions; follows no links."""
    yield root, 1, ""
    waiting = [(root, 1, "")]
    while waiting:
        place, repeats, fallback = waiting.pop()
        for name in sorted(subfolders(place), reverse=place != root):
            match = REPEATS.fullmatch(name)
            if match is not None:
                inner = (place / name, int(match[1]), match[2].strip())
            elif recursive:
                inner = (place / name, repeats, fallback)
            else:
                continue
            if inner[1] > 0:
                yield inner
                if recursive:
                    waiting.append(inner)


def subfolders(place: Path) -> list[str]:
    """Return the names of real, visible folders inside a folder."""
    with os.scandir(place) as entries:
        return [e.name for e in entries if e.name[0] != "." and e.is_dir(follow_symlinks=False)]


def read_place(root: Path, place: Path, repeats: int, fallback: str) -> Iterator[Example | Problem]:
    """Yield the examples and problems of one folder, by name, without its subfolders."""
    inner = "" if place == root else f"{place.relative_to(root).as_posix()}/"
    names, outside = listed(root, place)
    captions: dict[str, list[str]] = {}
    for name in names:
        stem, suffix = os.path.splitext(name)  # noqa: PTH122
        if suffix.lower() in SIDECARS:
            captions.setdefault(stem, []).append(name)
    owners: dict[str, str] = {}
    for name in names:
        stem, suffix = os.path.splitext(name)  # noqa: PTH122
        if suffix.lower() not in SUFFIXES:
            continue
        beside = captions.get(stem, [])
        what = misplaced(name, beside, outside, owners.setdefault(stem, name))
        text = "" if what else read_caption(f"{place}/{beside[0]}") if beside else fallback
        if what or isinstance(text, Problem):
            yield Problem(place / name, f"{place}/{what}") if what else text  # type: ignore[misc]
        else:
            yield Example(root, inner + name, text, repeats)


def listed(root: Path, place: Path) -> tuple[list[str], set[str]]:
    """Return the visible files of a folder by name, and those that are links out of the root."""
    with os.scandir(place) as entries:
        visible = [e for e in entries if e.name[0] != "."]
        files = sorted(e.name for e in visible if e.is_symlink() or e.is_file())
        links = [e.name for e in visible if e.is_symlink()]
    real = root.resolve()
    return files, {name for name in links if not inside(real, place / name)}


def misplaced(name: str, beside: list[str], outside: set[str], owner: str) -> str:
    """Say what is wrong with the files of one picture, or nothing."""
    for link in (name, *beside):
        if link in outside:
            return f"{link}: this link leads out of the folder."
    if len(beside) > 1:
        return f"{name}: has two captions, {' and '.join(beside)}; keep one."
    if beside and owner != name:
        return f"{name}: shares its caption file with {owner}; rename one."
    return ""


def inside(root: Path, link: Path) -> bool:
    """True where a link's target exists below the folder."""
    try:
        return link.resolve(strict=True).is_relative_to(root)
    except (OSError, RuntimeError):
        return False


def read_caption(path: str) -> str | Problem:
    """Return a caption without byte order mark, its lines joined by spaces."""
    try:
        with open(path, "rb") as file:  # noqa: PTH123 (a Path for each of 100,000 files is slow)
            raw = file.read()
    except OSError as error:
        return Problem(Path(path), f"{path}: cannot be read ({error.strerror}).")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return Problem(Path(path), f"{path}: is not UTF-8 (byte {error.start}); save it as UTF-8.")
    if "\0" in text:
        return Problem(Path(path), f"{path}: holds NUL characters; save it as UTF-8.")
    return " ".join(text.split())


def with_headers(examples: list[Example]) -> tuple[list[Example], list[Problem]]:
    """Fill in sizes and notes from the headers; return readable examples and the problems."""
    good: list[Example] = []
    problems: list[Problem] = []
    for example in examples:
        try:
            read = header(example.path)
        except Refused as error:
            problems.append(Problem(example.path, str(error)))
        else:
            good.append(replace(example, size=read.size, notes=read.notes))
    return good, problems


def summary(problems: list[Problem]) -> str:
    """Join the first problems into one sentence; with several, count the rest."""
    first = "; ".join(p.what.rstrip(".") for p in problems[:LISTED])
    rest = f"; and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
    return f"{first}{rest} (mend or remove, or skip broken images)."


def nothing(root: Path, recursive: bool) -> str:
    """Say why a folder has no pictures: empty, or all of them deeper."""
    if not recursive and any(
        Path(name).suffix.lower() in SUFFIXES for _, _, names in os.walk(root) for name in names
    ):
        return f"{root}: has pictures only in subfolders; read it recursively or name them 10_name."
    return f"{root}: holds no images ({', '.join(sorted(SUFFIXES))})."
