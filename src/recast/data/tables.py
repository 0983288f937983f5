"""Data sets of Hugging Face's `datasets`: saved ones (save_to_disk) and folders of Parquet files.

The picture column is the one of type Image, the caption's text, caption or prompt.  Rows are read
one at a time, undecoded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recast.data import metadata
from recast.data.folder import Example, Folder, Problem, missing
from recast.data.images import header
from recast.data.shards import NEEDS
from recast.data.subset import Subset
from recast.errors import Refused

SAVED = ("dataset_info.json", "dataset_dict.json")


@dataclass(frozen=True, eq=False)
class Row:
    """A picture in a table."""

    table: Any
    column: str
    number: int
    source: Path

    def __str__(self) -> str:
        return f"{self.source}, row {self.number}"

    def read(self) -> bytes:
        """Return its bytes, from the table or the file that the table names."""
        value = self.table[self.number][self.column]
        if value is None:
            raise Refused(f"{self}: has no picture.")
        return value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()


def holds(source: Path) -> bool:
    """Whether a folder is a saved data set, or one of Parquet files."""
    if not source.is_dir():
        return False
    return any((source / name).is_file() for name in SAVED) or bool(parquet(source))


def parquet(source: Path) -> list[str]:
    """The Parquet files of a folder or of its folder `data`: those of the split train, if named."""
    found = sorted(p for place in (source, source / "data") for p in place.glob("*.parquet"))
    train = [p for p in found if p.stem == "train" or p.name.startswith("train-")]
    return [str(p) for p in train or found]


def scan(source: Path, how: Subset) -> Folder:
    """Find the pictures of a table; reads headers, decodes nothing."""
    table, column, text = opened(source)
    if how.conditioning_data_dir:
        raise Refused(f"{source}: masks of a table are alpha channels: set alpha_mask instead.")
    captions = table[text] if text else None
    examples: list[Example] = []
    problems: list[Problem] = []
    repeats = 1 if how.num_repeats is None else how.num_repeats
    for number in range(len(table)):
        row = Row(table, column, number, source)
        said = captions[number] if captions is not None else None
        if said is None:
            said = missing(str(row), how, "")
        if isinstance(said, Problem):
            problems.append(Problem(row, said.what, said.wanted))
            continue
        said = metadata.clean(said)
        said = said if how.enable_wildcard else said.replace("\n", " ")
        try:
            read = header(row)
        except Refused as error:
            problems.append(Problem(row, str(error)))
        else:
            examples.append(
                Example(
                    source, f"row-{number}", said, repeats, read.size, read.notes, how=how,
                    packed=row,
                )
            )  # fmt: skip
    return Folder(source, tuple(examples), tuple(problems))


def opened(source: Path) -> tuple[Any, str, str | None]:
    """(table, picture column, caption column or None) of a data set, its `train` split."""
    try:
        import datasets
    except ImportError as error:
        raise Refused(f"{source}: reading this data set needs datasets: {NEEDS}.") from error
    try:
        if any((source / name).is_file() for name in SAVED):
            table = datasets.load_from_disk(str(source))
        else:
            table = datasets.Dataset.from_parquet(parquet(source))
    except Exception as error:  # the library raises whatever its many readers do
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Refused(f"{source}: datasets cannot read it ({reason}).") from error
    if isinstance(table, dict):
        if "train" not in table:
            raise Refused(f"{source}: has no split train (but {', '.join(table)}).")
        table = table["train"]
    kinds = table.features
    column = next((name for name, kind in kinds.items() if isinstance(kind, datasets.Image)), None)
    if column is None:
        raise Refused(f"{source}: has no column of pictures (but {', '.join(kinds)}).")
    text = next((name for name in metadata.TEXTS if name in kinds), None)
    return table.cast_column(column, datasets.Image(decode=False)), column, text
