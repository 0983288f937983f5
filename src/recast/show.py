"""What the command line prints of a finished run and of a file: plain words, a table, no more."""

from __future__ import annotations

from collections.abc import Mapping
from os.path import normpath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from recast.console import OUT

if TYPE_CHECKING:
    from recast.evaluate.values import Report

STYLES = {"kept": "green", "partly": "yellow", "lost": "red", "unknown": "dim"}


def show(report: Report, folder: Path) -> None:
    """The table of what was kept, then where the file is and how to load it."""
    from recast.evaluate.words import rows, summary

    table = Table(title=f"{report.model}: {report.source} → {report.target}", title_justify="left")
    for name, align in (("", "left"), ("original", "right"), ("converted", "right"), ("", "left")):
        table.add_column(name, justify=align)  # type: ignore[arg-type]
    for row in rows(report):
        label = Text(row.label, style=STYLES[row.state])
        table.add_row(row.name, row.original, row.converted, label)
    OUT.print(table)
    say(summary(report))
    for note in report.notes:
        say(note)
    say()
    for file in report.files:
        say(f"{normpath(folder / file.name)}  ({file.bytes / 1e6:.1f} MB): {file.use}")
    for howto in report.howto:
        say()
        say(f"{howto.program}: {howto.text}")
        for line in howto.code.splitlines():
            say(f"    {line}")
    say()
    say(f"Look at {folder / 'report.html'}")


def show_file(facts: Mapping[str, Any]) -> None:
    """What `inspect` found, one fact a line, nested facts indented."""
    for line in lines(facts):
        say(line)


def lines(facts: Mapping[str, Any], indent: int = 0) -> list[str]:
    """Facts as "name  value" lines; empty ones are left out."""
    found: list[str] = []
    pad = " " * indent
    for key, value in facts.items():
        name = key.replace("_", " ")
        if value in (None, "", [], (), {}):
            continue
        if isinstance(value, Mapping):
            found += [f"{pad}{name}", *lines(value, indent + 2)]
        elif isinstance(value, list | tuple) and isinstance(value[0], Mapping):
            found += [f"{pad}{name}"]
            for item in value:
                found += [f"{pad}  " + "  ".join(str(v) for v in item.values() if v)]
        elif isinstance(value, list | tuple):
            found.append(f"{pad}{name:<16} {', '.join(map(str, value))}")
        elif "\n" in str(value):
            found.append(
                f"{pad}{name:<16} {len(str(value).splitlines())} lines (--json shows them)"
            )
        else:
            shown = (
                f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
            )
            found.append(f"{pad}{name:<16} {shown}")
    return found


def say(text: str = "") -> None:
    """One line of plain text: no markup, no colour of numbers, no wrapping."""
    OUT.print(text, markup=False, highlight=False, soft_wrap=True)
