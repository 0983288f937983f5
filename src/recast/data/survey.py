"""What the trainer will see of a source: sizes, buckets, captions, duplicates, broken pictures.

Every picture is decoded once, unless only headers are asked for, so a broken body is found before
a run; two pictures are alike where the 64 signs of their brightness gradients agree (a difference
hash) and their colours are near, whatever their size and compression.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from recast.data.buckets import Fit, Size, fit
from recast.data.cache import hash_file
from recast.data.captions import canonical, tags_of
from recast.data.folder import Example, Folder
from recast.data.images import load
from recast.data.subset import PLAIN, Subset
from recast.errors import Refused
from recast.events import Event, Stage, Tick

if TYPE_CHECKING:
    from PIL.Image import Image

ROOM = 75  # tokens in a row of the text encoder
COMMON = 20
NEAR = 3  # levels of 256 between the colours of pictures that are alike


@dataclass(frozen=True)
class Part:
    """One folder: its pictures, how often each comes in an epoch, what it says otherwise."""

    name: str
    pictures: int
    samples: int
    uncaptioned: int
    settings: dict[str, Any]


@dataclass(frozen=True)
class Bucket:
    """One size of the training, and what falls into it."""

    width: int
    height: int
    pictures: int
    samples: int


@dataclass(frozen=True)
class Words:
    """Captions: how many there are none of, how long they are, and their commonest tags."""

    missing: int
    distinct: int
    tags: float
    tokens: float
    most_tokens: int
    in_several_rows: int
    common: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Survey:
    """Everything that `recast data` tells; files in the order of the source."""

    source: str
    pictures: int
    samples: int
    parts: tuple[Part, ...]
    buckets: tuple[Bucket, ...]
    enlarged: int
    cut: float
    words: Words
    notes: dict[str, int]
    duplicates: tuple[tuple[str, ...], ...]
    alike: tuple[tuple[str, ...], ...]
    same_stem: tuple[tuple[str, ...], ...]
    problems: tuple[str, ...]
    left_out: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return asdict(self)


def survey(found: Folder, side: int, *, decode: bool = True) -> Generator[Event, None, Survey]:
    """Look through a source at a training size; returns what was seen."""
    problems = [problem.what for problem in found.problems if not problem.wanted]
    usable: list[Example] = []
    prints: dict[bytes, list[tuple[str, bytes]]] = defaultdict(list)
    yield Stage("look at images", len(found.examples), "images")
    for count, example in enumerate(found.examples, 1):
        try:
            planned(example, side)
            if decode:
                signs, colours = gradients(load(example.path))
                prints[signs].append((str(example.path), colours))
        except Refused as error:
            problems.append(str(error))
        else:
            usable.append(example)
        yield Tick(count)
    twins = duplicates(usable)
    same = {name for group in twins for name in group[1:]}
    fits = [planned(example, side) for example in usable]
    return Survey(
        source=str(found.root),
        pictures=len(usable),
        samples=sum(example.repeats for example in usable),
        parts=tuple(parts(usable)),
        buckets=tuple(buckets(usable, fits)),
        enlarged=sum(one.scaled[0] > one.original[0] for one in fits),
        cut=round(fmean(map(cut, fits)), 4) if fits else 0.0,
        words=words(usable),
        notes=dict(Counter(note for example in usable for note in example.notes)),
        duplicates=twins,
        alike=tuple(group for found in prints.values() for group in alike(found, same)),
        same_stem=stems(usable),
        problems=tuple(problems),
        left_out=tuple(problem.what for problem in found.problems if problem.wanted),
    )


def planned(example: Example, side: int) -> Fit:
    """How a picture is fitted at a training size."""
    size = example.size
    assert size is not None
    return fit(size, example.how.sizes.table(side).choose(size))


def cut(one: Fit) -> float:
    """The share of a scaled picture that its crop leaves out."""
    return 1 - math.prod(one.target) / math.prod(one.scaled)


def parts(examples: Iterable[Example]) -> list[Part]:
    """The folders of a source in the order they come."""
    groups: dict[tuple[str, Subset], list[Example]] = defaultdict(list)
    for example in examples:
        inner = "" if example.packed is not None else str(Path(example.name).parent)
        groups[str(example.root / inner), example.how].append(example)
    return [
        Part(
            name, len(group), sum(e.repeats for e in group),
            sum(not e.caption for e in group), settings(how),
        )
        for (name, how), group in groups.items()
    ]  # fmt: skip


def settings(how: Subset) -> dict[str, Any]:
    """What a folder's settings say other than a plain folder's."""
    different: dict[str, Any] = {}
    for field in fields(how):
        value, plain = getattr(how, field.name), getattr(PLAIN, field.name)
        if field.name == "sizes":
            different |= {
                f.name: getattr(value, f.name)
                for f in fields(value)
                if getattr(value, f.name) != getattr(plain, f.name)
            }
        elif value != plain and field.name != "image_dir":
            different[field.name] = str(value) if isinstance(value, Path) else value
    return different


def buckets(examples: Sequence[Example], fits: Sequence[Fit]) -> list[Bucket]:
    """The sizes that are used, from the widest to the tallest."""
    count: Counter[Size] = Counter()
    samples: Counter[Size] = Counter()
    for example, one in zip(examples, fits, strict=True):
        count[one.target] += 1
        samples[one.target] += example.repeats
    order = sorted(count, key=lambda size: (-size[0] / size[1], -size[0]))
    return [Bucket(*size, count[size], samples[size]) for size in order]


def words(examples: Sequence[Example]) -> Words:
    """Count captions, their tags and their tokens."""
    from recast.text.tokens import encode

    texts = [canonical(example.caption, example.how) for example in examples if example.caption]
    lengths = {text: len(encode(text)) for text in dict.fromkeys(texts)}
    tags: Counter[str] = Counter()
    counts: list[int] = []
    for example in examples:
        if example.caption:
            own = tags_of(example.caption.replace("\n", example.how.caption_separator), example.how)
            counts.append(len(own))
            tags.update(own)
    return Words(
        missing=len(examples) - len(texts),
        distinct=len(lengths),
        tags=round(fmean(counts), 2) if counts else 0.0,
        tokens=round(fmean(lengths[text] for text in texts), 2) if texts else 0.0,
        most_tokens=max(lengths.values(), default=0),
        in_several_rows=sum(lengths[text] > ROOM for text in texts),
        common=tuple((tag, n) for tag, n in tags.most_common(COMMON) if n > 1),
    )


def gradients(picture: Image) -> tuple[bytes, bytes]:
    """(signs of brightness from each of 9 x 8 places to the next, colours of 8 x 8 places)."""
    from PIL.Image import Resampling

    colours = picture.resize((8, 8), Resampling.BOX).tobytes()
    grey = picture.convert("L").resize((9, 8), Resampling.BOX).tobytes()
    return bytes(grey[k] < grey[k + 1] for k in range(71) if k % 9 != 8), colours


def alike(found: Sequence[tuple[str, bytes]], same: set[str]) -> Iterator[tuple[str, ...]]:
    """Yield groups of pictures of one gradient hash whose colours are NEAR on average."""
    groups: list[tuple[bytes, list[str]]] = []
    for name, colours in found:
        if name in same:
            continue
        for first, names in groups:
            if fmean(abs(a - b) for a, b in zip(first, colours, strict=True)) < NEAR:
                if name not in names:
                    names.append(name)
                break
        else:
            groups.append((colours, [name]))
    yield from (tuple(names) for _, names in groups if len(names) > 1)


def duplicates(examples: Iterable[Example]) -> tuple[tuple[str, ...], ...]:
    """Pictures of the same bytes; only those of one length are read."""
    lengths: dict[int, list[Example]] = defaultdict(list)
    for example in examples:
        path = example.path
        length = path.stat().st_size if isinstance(path, Path) else len(path.read())
        lengths[length].append(example)
    hashes: dict[str, list[str]] = defaultdict(list)
    for group in lengths.values():
        for example in group if len(group) > 1 else ():
            name = str(example.path)
            known = hashes[hash_file(example.path)]
            if name not in known:  # one folder may be read twice, under other settings
                known.append(name)
    return tuple(tuple(group) for group in hashes.values() if len(group) > 1)


def stems(examples: Iterable[Example]) -> tuple[tuple[str, ...], ...]:
    """Pictures of one name that differ in their suffix only: often one exported twice."""
    names: dict[str, list[str]] = defaultdict(list)
    for example in examples:
        name = str(example.path)
        group = names[name.rpartition(".")[0]]
        if name not in group:
            group.append(name)
    return tuple(tuple(group) for stem, group in names.items() if stem and len(group) > 1)
