"""WebDataset shards: tar files in which a key's picture and caption are neighbours.

    00001.jpg  00001.txt  00002.webp  00002.json …      json: {"caption": …} or text, prompt

webdataset groups the members; a picture is read again later by its place in the tar.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from recast.data import metadata
from recast.data.folder import Example, Folder, Problem, missing
from recast.data.images import SUFFIXES, header
from recast.data.subset import Subset
from recast.errors import Refused

NEEDS = "pip install 'recast[data]'"


@dataclass(frozen=True)
class Member:
    """A picture inside a shard."""

    shard: Path
    name: str

    def __str__(self) -> str:
        return f"{self.shard}/{self.name}"

    def read(self) -> bytes:
        """Return its bytes."""
        place = members(self.shard).get(self.name)
        if place is None:
            raise Refused(f"{self}: is in the shard no more.")
        with self.shard.open("rb") as file:
            file.seek(place[0])
            return file.read(place[1])


@lru_cache(maxsize=1024)
def members(shard: Path) -> dict[str, tuple[int, int]]:
    """(offset, size) of every member of a shard."""
    with tarfile.open(shard, "r:") as tar:
        return {found.name: (found.offset_data, found.size) for found in tar if found.isfile()}


def holds(source: Path) -> bool:
    """Whether a source is a shard, or a folder of shards and no pictures."""
    if source.suffix == ".tar":
        return True
    if not source.is_dir():
        return False
    names = [path.suffix.lower() for path in source.iterdir()]
    return ".tar" in names and not SUFFIXES.intersection(names)


def scan(source: Path, how: Subset) -> Folder:
    """Find the pictures of shards; reads each shard once, decoding nothing."""
    try:
        from webdataset import tariterators
    except ImportError as error:
        raise Refused(f"{source}: reading shards needs webdataset: {NEEDS}.") from error
    if how.masked and how.conditioning_data_dir:
        raise Refused(f"{source}: masks of shards are alpha channels: set alpha_mask instead.")
    paths = [source] if source.suffix == ".tar" else sorted(source.glob("*.tar"))
    examples: list[Example] = []
    problems: list[Problem] = []
    for shard in paths:
        if not shard.is_file():
            raise Refused(f"{shard}: no such shard.")
        try:
            with shard.open("rb") as file:
                stream = tariterators.tar_file_iterator(file)
                named = ({**one, "__url__": str(shard)} for one in stream)
                for sample in tariterators.group_by_keys(named, lcase=False):
                    for found in read_sample(shard, sample, how):
                        (examples if isinstance(found, Example) else problems).append(found)  # type: ignore[arg-type]
        except (tarfile.TarError, OSError, EOFError) as error:
            problems.append(Problem(shard, f"{shard}: is no whole tar file ({error})."))
        except ValueError as error:  # webdataset's word for two members of one name
            problems.append(Problem(shard, f"{shard}: {str(error).splitlines()[0]}."))
    return Folder(source, tuple(examples), tuple(problems))


def read_sample(shard: Path, sample: dict[str, Any], how: Subset) -> Iterator[Example | Problem]:
    """Yield the picture of one key, or what is wrong with it."""
    key = sample["__key__"]
    kinds = [kind for kind in sample if f".{kind.rpartition('.')[2].lower()}" in SUFFIXES]
    if not kinds:
        return
    member = Member(shard, f"{key}.{kinds[0]}")
    if len(kinds) > 1:
        yield Problem(member, f"{member}: its key has {len(kinds)} pictures; keep one.")
        return
    text = caption(member, sample, how)
    if text is None:
        text = missing(str(member), how, "")
    if isinstance(text, Problem):
        yield replace(text, path=member)
        return
    try:
        read = header(_Held(str(member), sample[kinds[0]]))
    except Refused as error:
        yield Problem(member, str(error))
        return
    repeats = 1 if how.num_repeats is None else how.num_repeats
    yield Example(shard, member.name, text, repeats, read.size, read.notes, how=how, packed=member)


@dataclass(frozen=True)
class _Held:
    """Bytes at hand under a picture's name."""

    name: str
    raw: bytes

    def __str__(self) -> str:
        return self.name

    def read(self) -> bytes:
        return self.raw


def caption(member: Member, sample: dict[str, Any], how: Subset) -> str | Problem | None:
    """The caption of a key: its text, or what its JSON says."""
    kind = next((k for k in ("txt", "caption", "json") if k in sample), None)
    if kind is None:
        return None
    try:
        text: Any = sample[kind].decode("utf-8-sig")
        if kind == "json":
            entry = json.loads(text)
            text = next((entry[n] for n in metadata.TEXTS if entry.get(n) is not None), None)
    except (UnicodeDecodeError, ValueError, AttributeError, RecursionError):
        return Problem(member, f"{member}: its {kind} is no UTF-8 {kind}.")
    if text is None:
        return None
    if not isinstance(text, str):
        return Problem(member, f"{member}: its caption is {text!r:.40}; give text.")
    cleaned = metadata.clean(text)
    return cleaned if how.enable_wildcard else cleaned.replace("\n", " ")
