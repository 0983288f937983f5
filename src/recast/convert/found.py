"""The images of a run as its recipe reads them, and what names them."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from recast.convert.sources import images_of
from recast.errors import Refused
from recast.recipe import Recipe, override

if TYPE_CHECKING:
    from recast.convert import Job
    from recast.data.folder import Example
    from recast.data.folder import Folder as Found


def found_in(images: Path, *, skip_broken: bool, recipe: Recipe | None = None) -> Found:
    """What a folder or dataset file has, under the recipe's settings; names broken ones."""
    from recast.data.gather import gather as gather_images
    from recast.data.subset import PLAIN, from_recipe

    how = PLAIN if recipe is None else from_recipe(recipe.images)
    prior = 1.0 if recipe is None else recipe.images.prior_loss_weight
    on_broken: Literal["refuse", "skip"] = "skip" if skip_broken else "refuse"
    return gather_images(images, how, prior=prior, on_broken=on_broken)


def examples_of(
    images: Path, *, skip_broken: bool, recipe: Recipe | None = None
) -> tuple[Example, ...]:
    """The images of a folder by name; raises Refused for an empty one, naming broken ones."""
    return found_in(images, skip_broken=skip_broken, recipe=recipe).examples


def with_dataset(job: Job) -> tuple[Job, tuple[str, ...]]:
    """A job with its dataset file's batch size, and what the user should know of that file."""
    from recast.data import dataset_file
    from recast.data.subset import from_recipe

    source, batch = images_of(job), job.recipe.train.batch
    if source is None or source.suffix.lower() != ".toml":
        return job, ()
    found = dataset_file.read(source, from_recipe(job.recipe.images))
    if found.batch is None or found.batch == batch:
        return job, found.remarks
    said = f"train.batch is {found.batch}, as {source} has it, and not the recipe's {batch}."
    return replace(job, recipe=override(job.recipe, batch=found.batch)), (*found.remarks, said)


def check_sizes(examples: tuple[Example, ...], side: int, *, skip_broken: bool) -> None:
    """Refuse bucket settings that leave no bucket, and pictures that none of them takes."""
    for sizes in dict.fromkeys(example.how.sizes for example in examples):
        sizes.table(side)
    for example in () if skip_broken else examples:
        if example.size is not None:
            try:
                example.how.sizes.table(side).choose(example.size)
            except Refused as error:
                raise Refused(f"{example.path}: {error}") from error


def images_digest(examples: tuple[Example, ...]) -> str:
    """Hash of every image and caption that will be trained on, and of its folder's settings."""
    from recast.data.cache import hash_file
    from recast.data.subset import PLAIN

    found = hashlib.sha256()
    for example in examples:
        line = f"{example.name}\0{example.repeats}\0{example.caption}\0{hash_file(example.path)}\n"
        found.update(line.encode())
        if example.mask is not None:
            found.update(hash_file(example.mask).encode())
        if example.how != PLAIN:
            found.update(example.how.stated.encode())
    return found.hexdigest()[:16]
