"""The command line: one thin function per verb. Heavy imports wait until a verb needs them."""

from __future__ import annotations

import os
import sys

import typer

from recast import __version__, cli_files, cli_run
from recast.console import ERR
from recast.errors import RecastError

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


for verb in (*cli_run.VERBS, *cli_files.VERBS):
    app.command(no_args_is_help=True)(verb)
app.command()(cli_run.demo)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; a user's mistake ends in one sentence and its exit code."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        app(args=arguments)
    except RecastError as error:
        if "--debug" in arguments:
            raise
        ERR.print(f"recast: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(error.code)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
