"""Everything that a run can be pointed at: a folder, a dataset file, metadata, shards, a table.

DIR              pictures with captions beside them, and its folders named 10_name
FILE.toml        kohya's dataset file: several folders, each with its settings
FILE.json(l)     the pictures that a metadata file names, below its own folder
DIR of .tar      WebDataset shards (pip install 'recast[data]')
DIR by datasets  a data set that Hugging Face's library has saved, or Parquet files
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from recast.data import dataset_file, shards, tables
from recast.data.folder import Example, Folder, Problem, scan, settled
from recast.data.subset import PLAIN, Subset
from recast.errors import Refused

METADATA = (".json", ".jsonl", ".csv")
Broken = Literal["refuse", "skip"]


def gather(
    source: Path,
    how: Subset = PLAIN,
    *,
    prior: float = 1.0,
    on_broken: Broken = "refuse",
    headers: bool = True,
) -> Folder:
    """Find the pictures and captions of a source, under the recipe's settings; reads no pixels.

    prior: what the samples of regularisation folders count in the loss. Raises Refused as `scan`.
    """
    if source.suffix.lower() != ".toml":
        return found_in(source, how, on_broken, headers)
    examples: list[Example] = []
    problems: list[Problem] = []
    for subset in dataset_file.read(source, how, prior).subsets:
        assert subset.image_dir is not None
        found = found_in(subset.image_dir, subset, "skip", headers, quiet=True)
        examples += found.examples
        problems += found.problems
    balanced = tuple(with_regularisation(examples))
    return settled(Folder(source, balanced, tuple(problems)), on_broken)


def found_in(
    source: Path, how: Subset, on_broken: Broken, headers: bool, *, quiet: bool = False
) -> Folder:
    """Find what is in one source; `quiet` lets a source be of broken pictures only."""
    if source.suffix.lower() in METADATA:
        how, source = replace(how, metadata_file=source), source.parent
    if shards.holds(source):
        return settled(shards.scan(source, how), on_broken)
    if tables.holds(source):
        return settled(tables.scan(source, how), on_broken)
    return scan(source, on_broken=on_broken, headers=headers, how=how)


def with_regularisation(examples: Sequence[Example]) -> Iterator[Example]:
    """Yield the examples, those for regularisation repeated until they are as many (kohya's rule).

    Of more than enough only the first are taken; each is repeated once more, in turn, until both
    kinds weigh the same.
    """
    regular = [example for example in examples if example.how.is_reg]
    taught = [example for example in examples if not example.how.is_reg]
    yield from taught
    wanted = sum(example.repeats for example in taught)
    if not regular:
        return
    if not taught:
        raise Refused("All folders are for regularisation (is_reg): give one to be learnt too.")
    chosen: list[Example] = []
    total = 0
    for example in regular:
        if total >= wanted:
            break
        chosen.append(example)
        total += example.repeats
    for place in range(max(0, wanted - total)):
        at = place % len(chosen)
        chosen[at] = replace(chosen[at], repeats=chosen[at].repeats + 1)
    yield from chosen
