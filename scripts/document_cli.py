"""Writes docs/cli.md from the commands themselves: python scripts/document_cli.py > docs/cli.md"""

from __future__ import annotations

import inspect
from collections.abc import Iterator

INTRODUCTION = """# The command line

Written by `python scripts/document_cli.py > docs/cli.md`; a test keeps it true.

`MODEL` is a safetensors file, a diffusers folder, or `pocket-xl` or `pocket-15`, which ship with
Recast. Results go to stdout, progress and errors to stderr. `--json` prints a result for scripts.
An error is one sentence; `recast --debug VERB …` shows its traceback.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | a check failed (verify) |
| 2 | bad input or usage: nothing was written |
| 4 | training diverged or collapsed: the last good state is kept |
| 5 | no room on the disk or the device |
| 130, 143 | stopped by Ctrl-C or SIGTERM with the state saved: the same command goes on |

Verbs with a run folder (`convert`, `train`, `dream`) resume: the same command does what is missing.
"""


def pages() -> Iterator[str]:
    """The page, piece by piece."""
    import typer

    from recast.cli import app

    yield INTRODUCTION
    for name, command in commands(typer.main.get_command(app)):
        about, _, example = inspect.cleandoc(command.help or "").partition("Example: ")
        yield f"## recast {name}\n\n{about.strip()}\n"
        if example:
            yield f"```\n{' '.join(example.split())}\n```\n"
        yield "| | |\n|---|---|"
        for parameter in command.params:  # type: ignore[attr-defined]
            if parameter.name == "help":
                continue
            yield f"| `{spelled(parameter)}` | {described(parameter)} |"
        yield ""


def commands(group: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Every verb with its name, a verb of several words by all of them."""
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        if hasattr(command, "commands"):
            yield from commands(command, f"{prefix}{name} ")
        else:
            yield prefix + name, command


def spelled(parameter: object) -> str:
    """An argument in capitals, an option with its dashes."""
    if parameter.param_type_name == "argument":  # type: ignore[attr-defined]
        return str(parameter.name).upper()  # type: ignore[attr-defined]
    return ", ".join(parameter.opts)  # type: ignore[attr-defined]


def described(parameter: object) -> str:
    """Its help, and its default where that says something."""
    text = (getattr(parameter, "help", None) or "").replace("|", "\\|")
    default = getattr(parameter, "default", None)
    if getattr(parameter, "required", False):
        return f"{text} Required.".strip()
    if default in (None, False, "", ()) or callable(default):
        return text
    return f"{text} Default: `{default}`."


if __name__ == "__main__":
    print("\n".join(pages()))
