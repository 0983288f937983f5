"""The command line: one thin function per verb. Heavy imports wait until a verb needs them."""

from __future__ import annotations

import os
import sys

import typer

from recast import (
    __version__,
    cli_assessor,
    cli_chop,
    cli_data,
    cli_distill,
    cli_dream,
    cli_files,
    cli_join,
    cli_kohya,
    cli_lora,
    cli_patch,
    cli_run,
    cli_split,
    cli_surgery,
    cli_track,
    processes,
)
from recast.commit import FULL
from recast.console import ERR
from recast.errors import NoRoom, RecastError, Refused

SHARED = ("train", "convert", "distill")

app = typer.Typer(
    name="recast",
    help="Change what a Stable Diffusion checkpoint predicts, without losing what it knows.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"recast {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and leave."
    ),
) -> None:
    """Change what a Stable Diffusion checkpoint predicts, without losing what it knows."""


for verb in (
    *cli_run.VERBS, *cli_distill.VERBS, *cli_dream.VERBS, *cli_data.VERBS, *cli_patch.VERBS,
    *cli_files.VERBS, *cli_split.VERBS, *cli_lora.VERBS, *cli_chop.VERBS, *cli_track.VERBS,
    *cli_surgery.VERBS, *cli_kohya.VERBS, *cli_join.VERBS,
):  # fmt: skip
    app.command(no_args_is_help=True)(verb)
app.command()(cli_run.demo)
app.add_typer(cli_assessor.app, name="assessor")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; a user's mistake ends in one sentence and its exit code."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    arguments = sys.argv[1:] if arguments is None else arguments
    given = [word for word in arguments if word != "--debug"]  # it may stand anywhere
    try:
        shared(given)
        app(args=given)
    except KeyboardInterrupt:
        sys.exit(130)
    except SystemExit as end:
        if not end.code:
            processes.leave()
        raise
    except Exception as error:
        if len(given) < len(arguments):
            raise
        code, sentence = told(error)
        if processes.speaks(code):
            said = f"recast: {sentence}"
            ERR.print(said, style="red", highlight=False, markup=False, soft_wrap=True)
        processes.linger()
        sys.exit(code)


def shared(words: list[str]) -> None:
    """Meet the other processes of a launch; refuses verbs that several cannot share."""
    if not processes.several():
        return
    verb = next((word for word in words if not word.startswith("-")), "")
    processes.join()
    if verb not in SHARED:
        listed = f"{', '.join(SHARED[:-1])} and {SHARED[-1]}"
        raise Refused(
            f"{processes.count()} processes can share {listed}: run recast {verb} "
            "without a launcher."
        )


def told(error: Exception) -> tuple[int, str]:
    """An error's exit code and what the user is told of it."""
    if isinstance(error, RecastError):
        return error.code, str(error)
    if isinstance(error, OSError) and error.errno in FULL:
        place = error.filename or "the disk"
        return NoRoom.code, f"{place} is full: make room there; the same command goes on."
    # torch is here already if it has run out of memory; importing it would be slow
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return NoRoom.code, (
            "the memory of the device is too small: lower train.batch (and raise "
            "train.accumulate), or set train.precision to bf16, in the recipe."
        )
    return 1, (
        f"unexpected {type(error).__name__}: {error} (a bug in Recast, or damage on this machine; "
        "--debug shows where)."
    )


if __name__ == "__main__":
    main()
