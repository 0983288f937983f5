"""A folder of pictures with captions beside them, as kohya's and OneTrainer's users keep them.

`x.png` has its caption in `x.txt` or `x.caption`, not both.  A subfolder named `10_name` is read
with 10 repeats, and `name` is the caption of its pictures that have none.  A `metadata.jsonl` or
`.csv` has the captions of pictures without a file of their own.  Hidden files are passed over.
Nothing is decoded here: headers are read (sizes, formats), bodies when a picture is first used.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from recast.data import metadata
from recast.data.images import SUFFIXES, Picture, header
from recast.data.masks import masks_of
from recast.data.subset import PLAIN, Subset
from recast.errors import Refused

SIDECARS = (".txt", ".caption")
REPEATS = re.compile(r"(\d{1,6})_(.*)", re.DOTALL)
LISTED = 3


@dataclass(frozen=True, slots=True)
class Example:
    """One picture; `name` is its path inside `root`, `size` (width, height) when upright.

    `how` are its folder's settings, `mask` where its mask lies, `packed` what reads a picture that
    is no file of its own.
    """

    root: Path
    name: str
    caption: str
    repeats: int = 1
    size: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()
    how: Subset = PLAIN
    mask: Path | None = None
    packed: Picture | None = None

    @property
    def path(self) -> Picture:
        """Where the picture lies."""
        return self.root / self.name if self.packed is None else self.packed


@dataclass(frozen=True)
class Problem:
    """Something that keeps a picture from being used, in one sentence that names the file.

    `wanted` are those that the settings leave out on purpose.
    """

    path: Picture
    what: str
    wanted: bool = False


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
    how: Subset = PLAIN,
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
    table = None if how.metadata_file is None else metadata.read(how.metadata_file)
    masks = masks_of(how)
    for place, repeats, fallback in places(root, recursive):
        for found in read_place(root, place, repeats, fallback, how, table, masks):
            (examples if isinstance(found, Example) else problems).append(found)  # type: ignore[arg-type]
    if headers:
        examples, broken = with_headers(examples)
        problems += broken
    return settled(Folder(root, tuple(examples), tuple(problems)), on_broken, recursive)


def settled(found: Folder, on_broken: Literal["refuse", "skip"], recursive: bool = False) -> Folder:
    """Return what was found; raises Refused for problems, unless they are skipped, and nothing."""
    bad = [problem for problem in found.problems if not problem.wanted]
    if bad and (on_broken == "refuse" or not found.examples):
        raise Refused(summary(bad))
    if not found.examples:
        if found.problems:
            raise Refused(summary(list(found.problems)))
        raise Refused(nothing(found.root, recursive))
    return found


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


def read_place(
    root: Path,
    place: Path,
    repeats: int,
    fallback: str,
    how: Subset = PLAIN,
    table: metadata.Captions | None = None,
    masks: dict[str, Path] | None = None,
) -> Iterator[Example | Problem]:
    """Yield the examples and problems of one folder, by name, without its subfolders.

    table: captions of the whole root. masks: by picture's name inside the root, without suffix.
    """
    inner = "" if place == root else f"{place.relative_to(root).as_posix()}/"
    names, outside = listed(root, place)
    sidecars = (how.caption_extension,) if how.caption_extension else SIDECARS
    captions: dict[str, list[str]] = {}
    for name in names:
        stem, suffix = os.path.splitext(name)  # noqa: PTH122
        if suffix.lower() in sidecars:
            captions.setdefault(stem, []).append(name)
    own = next((metadata.read(place / name) for name in metadata.NAMES if name in names), None)
    owners: dict[str, str] = {}
    for name in names:
        stem, suffix = os.path.splitext(name)  # noqa: PTH122
        if suffix.lower() not in SUFFIXES:
            continue
        beside, path = captions.get(stem, []), f"{place}/{name}"
        listed_as = None if table is None else table.of(inner + name, path)
        if listed_as is not None:
            beside = []  # a metadata file that was named goes before what lies beside
        known = own.of(name, path) if own is not None and listed_as is None else None
        what = misplaced(name, beside, outside, owners.setdefault(stem, name), known)
        if what:
            yield Problem(place / name, f"{place}/{what}")
            continue
        text: str | Problem | None = known if listed_as is None else listed_as
        if beside:
            text = read_caption(f"{place}/{beside[0]}", how.enable_wildcard)
        if text is None:
            text = missing(path, how, fallback) if table is None else unlisted(path, how)
        elif isinstance(text, str) and not how.enable_wildcard:
            text = text.replace("\n", " ")
        mask = None if masks is None else masks.get(inner + stem)
        if isinstance(text, Problem):
            yield text
        elif masks is not None and mask is None:
            yield Problem(place / name, f"{path}: has no mask in {how.conditioning_data_dir}.")
        else:
            times = repeats * (1 if how.num_repeats is None else how.num_repeats)
            yield Example(root, inner + name, text, times, how=how, mask=mask)


def missing(path: str, how: Subset, fallback: str) -> str | Problem:
    """What a picture without a caption is given, or why it is not used."""
    text = how.class_tokens or fallback
    if text or how.on_missing_caption == "empty":
        return text
    if how.on_missing_caption == "skip":
        return Problem(Path(path), f"{path}: has no caption.", wanted=True)
    return Problem(
        Path(path), f"{path}: has no caption; write one, or set on_missing_caption to empty."
    )


def unlisted(path: str, how: Subset) -> Problem:
    """A picture that the folder's metadata, which says what is used, does not name."""
    return Problem(Path(path), f"{path}: is not named in {how.metadata_file}.", wanted=True)


def listed(root: Path, place: Path) -> tuple[list[str], set[str]]:
    """Return the visible files of a folder by name, and those that are links out of the root."""
    with os.scandir(place) as entries:
        visible = [e for e in entries if e.name[0] != "."]
        files = sorted(e.name for e in visible if e.is_symlink() or e.is_file())
        links = [e.name for e in visible if e.is_symlink()]
    real = root.resolve()
    return files, {name for name in links if not inside(real, place / name)}


def misplaced(
    name: str, beside: list[str], outside: set[str], owner: str, known: str | None = None
) -> str:
    """Say what is wrong with the files of one picture, or nothing."""
    for link in (name, *beside):
        if link in outside:
            return f"{link}: this link leads out of the folder."
    if len(beside) > 1:
        return f"{name}: has two captions, {' and '.join(beside)}; keep one."
    if beside and known is not None:
        return f"{name}: has a caption in {beside[0]} and one in the metadata; keep one."
    if beside and owner != name:
        return f"{name}: shares its caption file with {owner}; rename one."
    return ""


def inside(root: Path, link: Path) -> bool:
    """True where a link's target exists below the folder."""
    try:
        return link.resolve(strict=True).is_relative_to(root)
    except (OSError, RuntimeError):
        return False


def read_caption(path: str, lines: bool = False) -> str | Problem:
    """Return a caption without byte order mark, its lines joined by spaces unless they matter."""
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
    return metadata.clean(text) if lines else " ".join(text.split())


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
