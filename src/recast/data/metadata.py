"""Captions of many pictures in one file: kohya's JSON, or metadata.jsonl and .csv.

    kohya   {"1.png": {"caption": "…", "tags": "a, b"}, …}    keys are paths, suffix or not
    lines   {"file_name": "1.png", "text": "…"}               one picture a line

kohya's tags follow its caption after a comma.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any

from recast.errors import Refused

NAMES = ("metadata.jsonl", "metadata.csv")  # read where they lie in a folder of images
TEXTS = ("text", "caption", "prompt")
MOST = 1 << 30  # bytes


@dataclass(frozen=True)
class Captions:
    """Captions by picture: by path below the folder, by absolute path, and by bare stem."""

    path: Path
    texts: Mapping[str, str]
    stems: Mapping[str, str] = field(default_factory=dict)

    def of(self, name: str, path: str) -> str | None:
        """The caption of a picture named `name` inside the folder, None where there is none."""
        for key in (name, bare(name), path, bare(path)):
            if key in self.texts:
                return self.texts[key]
        return self.stems.get(stem(name))


def read(path: Path) -> Captions:
    """Read a metadata file; refuses by line or key what cannot be meant."""
    try:
        if path.stat().st_size > MOST:
            raise Refused(f"{path}: more than {MOST >> 30} GiB is no metadata file.")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise Refused(f"{path}: cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise Refused(f"{path}: is not UTF-8 (byte {error.start}); save it as UTF-8.") from error
    pairs = {".jsonl": of_lines, ".csv": of_csv}.get(path.suffix.lower(), of_kohya)
    found: dict[str, str] = {}
    for key, caption in pairs(path, text):
        key = key.replace("\\", "/")
        if found.setdefault(key, caption) != caption:
            raise Refused(f"{path}: {key} has two captions; keep one.")
    # absolute keys name the machine they were made on: there the stem has to do
    stems: dict[str, str] = {}
    twice: set[str] = set()
    for key, caption in found.items():
        if key.startswith("/") or PureWindowsPath(key).drive:
            twice |= {stem(key)} & stems.keys()
            stems[stem(key)] = caption
    return Captions(path, found, {key: text for key, text in stems.items() if key not in twice})


def of_lines(path: Path, text: str) -> Iterator[tuple[str, str]]:
    """Yield (file name, caption) of JSON lines."""
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield row(f"{path}, line {number}", parsed(f"{path}, line {number}", line))


def of_csv(path: Path, text: str) -> Iterator[tuple[str, str]]:
    """Yield (file name, caption) of a table with a head line."""
    for number, line in enumerate(csv.DictReader(io.StringIO(text)), 2):
        yield row(f"{path}, line {number}", line)


def of_kohya(path: Path, text: str) -> Iterator[tuple[str, str]]:
    """Yield (key, caption) of kohya's JSON."""
    table = parsed(str(path), text)
    if not isinstance(table, dict):
        raise Refused(f"{path}: should be a table of pictures, {{name: {{caption, tags}}}}.")
    for key, entry in table.items():
        if not isinstance(entry, dict):
            raise Refused(f"{path}: {key} should hold a table with caption or tags.")
        parts = [entry.get(name) for name in ("caption", "tags")]
        if odd := [part for part in parts if not isinstance(part, str | None)]:
            raise Refused(f"{path}: {key} has a caption of {odd[0]!r:.40}; give text.")
        yield key, ", ".join(clean(part) for part in parts if part)


def row(place: str, entry: Any) -> tuple[str, str]:
    """(file name, caption) of one row."""
    if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
        raise Refused(f'{place}: should be a table with a "file_name" and a "text".')
    name = next((name for name in TEXTS if entry.get(name) is not None), None)
    text = "" if name is None else entry[name]
    if not isinstance(text, str):
        raise Refused(f"{place}: {name} is {text!r:.40}; give text.")
    return entry["file_name"], clean(text)


def parsed(place: str, text: str) -> Any:
    """JSON, or a refusal that names its place."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Refused(f"{place}: is no JSON ({str(error).splitlines()[0]}).") from error


def clean(text: str) -> str:
    """A caption with its lines kept, runs of blanks within them made one, NUL taken out."""
    lines = (" ".join(line.split()) for line in text.replace("\0", "").splitlines())
    return "\n".join(line for line in lines if line)


def bare(name: str) -> str:
    """A path without its suffix."""
    head, dot, tail = name.rpartition(".")
    return head if dot and "/" not in tail else name


def stem(name: str) -> str:
    """A file's name without folders and suffix."""
    return bare(name.rpartition("/")[2])
