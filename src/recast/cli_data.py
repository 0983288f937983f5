"""The verb that shows what a trainer will see: data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recast import console
from recast.cli_common import Force, Json
from recast.errors import CheckFailed, Refused
from recast.show import say

if TYPE_CHECKING:
    from recast.data.folder import Folder
    from recast.data.survey import Survey
    from recast.recipe import Recipe

Missing = Annotated[
    str | None,
    typer.Option(
        help="Of pictures without a caption: empty (the empty prompt), skip, refuse; the recipe's "
        "otherwise."
    ),
]
LISTED = 12


def data(
    source: Annotated[
        Path,
        typer.Argument(
            help="A folder of images, a dataset file of kohya's (.toml), metadata (.json, .jsonl, "
            ".csv), WebDataset shards, a data set of Hugging Face's."
        ),
    ],
    recipe: Annotated[
        str, typer.Option(help="The recipe whose section images holds for every folder.")
    ] = "train",
    size: Annotated[
        int | None, typer.Option(min=8, help="Side of the training in pixels; else the recipe's.")
    ] = None,
    on_missing_caption: Missing = None,
    fast: Annotated[
        bool, typer.Option("--fast", help="Read headers only: broken bodies stay unseen.")
    ] = False,
    sheet: Annotated[
        Path | None, typer.Option(help="Write a contact sheet: a page (.html) or a picture (.png).")
    ] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Show what the trainer will see: counts, buckets, captions, duplicates, broken pictures.

    Ends with exit code 1 where a picture cannot be used.

    Example: recast data photos --sheet photos.html
    """
    from recast.data.survey import survey
    from recast.recipe import load

    how = with_policy(load(recipe), on_missing_caption)
    side = size or how.data.size or 1024
    found = looked_through(source, how, headers=True)
    facts: dict[str, Survey] = {}

    def events() -> Any:
        facts["found"] = yield from survey(found, side, decode=not fast)

    console.follow(events())
    seen = facts["found"]
    if sheet is not None:
        from recast.data.sheet import write_sheet

        write_sheet(sheet, found.examples, seen, side, force=force)
    if json:
        console.emit(seen.as_json())
    else:
        tell(seen)
    if seen.problems:
        raise CheckFailed(
            f"{len(seen.problems)} of {len(seen.problems) + seen.pictures} pictures of {source} "
            "cannot be used: mend or remove them, or train with --skip-broken."
        )


def with_policy(recipe: Recipe, on_missing_caption: str | None) -> Recipe:
    """A recipe with the command line's policy for pictures without a caption."""
    from recast.recipe import override

    if on_missing_caption is None:
        return recipe
    return override(recipe, images={"on_missing_caption": on_missing_caption})


def looked_through(source: Path, recipe: Recipe, *, headers: bool) -> Folder:
    """What a source holds, broken pictures listed and not refused."""
    from recast.data.gather import gather
    from recast.data.subset import from_recipe

    if not source.exists():
        raise Refused(f"{source}: no such folder or file.")
    how = from_recipe(recipe.images)
    prior = recipe.images.prior_loss_weight
    return gather(source, how, prior=prior, on_broken="skip", headers=headers)


def tell(seen: Survey) -> None:
    """Print a survey in plain words."""
    words = seen.words
    say(f"{seen.source}: {seen.pictures:,} pictures, {seen.samples:,} samples an epoch")
    varied = len(seen.parts) > 1 or any(part.settings for part in seen.parts)
    for part in seen.parts if varied else ():
        own = ", ".join(f"{name} {value}" for name, value in part.settings.items())
        say(f"  {part.name}: {part.pictures:,} pictures, {part.samples:,} samples  {own}".rstrip())
    say("buckets:")
    for one in seen.buckets:
        say(f"  {one.width}x{one.height:<5} {one.pictures:>7,} pictures {one.samples:>8,} samples")
    say(f"  {seen.enlarged:,} enlarged; {seen.cut:.1%} of a picture cut away on average")
    say(
        f"captions: {words.missing:,} missing, {words.distinct:,} different, {words.tags:g} tags "
        f"and {words.tokens:g} tokens on average, {words.most_tokens:,} tokens at most, "
        f"{words.in_several_rows:,} longer than 75"
    )
    if words.common:
        say("  commonest tags: " + ", ".join(f"{tag} ({n})" for tag, n in words.common[:LISTED]))
    for note, count in seen.notes.items():
        say(f"{count:,} {note}")
    groups = (
        ("the same bytes", seen.duplicates), ("alike", seen.alike),
        ("one name twice", seen.same_stem),
    )  # fmt: skip
    for title, found in groups:
        some(title, [" = ".join(group) for group in found])
    some("left out", list(seen.left_out))
    some("cannot be used", list(seen.problems))


def some(title: str, lines: list[str]) -> None:
    """Print the first of many lines under a title, and how many there are."""
    if lines:
        say(f"{title}: {len(lines):,}")
        for line in lines[:LISTED]:
            say(f"  {line}")
        if len(lines) > LISTED:
            say(f"  and {len(lines) - LISTED:,} more (--json lists all)")


VERBS = (data,)
