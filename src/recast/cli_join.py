"""The verbs that put files together and say what they are: mark."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from recast import console
from recast.cli_common import Force, Json
from recast.errors import Refused
from recast.show import show_file


def mark(
    file: Annotated[Path, typer.Argument(help="A checkpoint or adapter file.")],
    out: Annotated[
        Path | None, typer.Option(help="The file to write; without it, nothing is changed.")
    ] = None,
    as_: Annotated[
        str | None, typer.Option("--as", help="What it predicts: eps, v, v-zsnr, flow or x0.")
    ] = None,
    strip: Annotated[
        bool, typer.Option("--strip", help="Take out every statement about what it predicts.")
    ] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="A field of modelspec, as title=…, license=…; empty removes it."
        ),
    ] = None,
    hints: Annotated[
        bool,
        typer.Option(
            "--hints",
            help="Write beside it what tools without a marker need: words, and for v "
            "the .yaml of A1111.",
        ),
    ] = False,
    shift: Annotated[float, typer.Option(help="With --hints: the shift that flow wants.")] = 1.0,
    force: Force = False,
    json: Json = False,
) -> None:
    """Say what each program will take a file for, and correct what the file says of itself.

    Example: recast mark model.safetensors --as v-zsnr --set title=Mine --out marked.safetensors
    """  # fmt: skip
    from recast.surgery.hints import hints as sidecars
    from recast.surgery.hints import write_hints
    from recast.surgery.mark import Marking, fields, objective_of, said
    from recast.surgery.mark import mark as mark_file

    marking = Marking(as_ and objective_of(as_), strip, fields(set_ or []))
    changes = bool(as_ or strip or set_)
    if as_ and strip:
        raise Refused("--as replaces every statement that --strip takes out: give one of them.")
    if changes and out is None:
        raise Refused("a file is never changed in place: name the one to write with --out.")
    if out is not None and not changes:
        raise Refused("nothing is to be changed: give --as, --strip or --set, or leave out --out.")
    facts: dict[str, Any] = {}
    if out is not None:
        if hints:
            refuse_hints(out, force=force)
        facts["sha256"] = mark_file(file, out, marking, force=force)
    final = out or file
    if hints:
        found = sidecars(final, final, shift=shift)
        facts["hints"] = [str(path) for path in write_hints(found, force=force)]
    facts = {**said(final), **facts}
    console.emit(facts) if json else show_file(facts)


def refuse_hints(path: Path, *, force: bool) -> None:
    """Refuse sidecars that exist, before the long work."""
    from recast.commit import refuse_target
    from recast.surgery.hints import WORDS_TAIL

    for tail in (WORDS_TAIL, ".yaml"):
        refuse_target(path.with_suffix(tail), force=force)


VERBS = (mark,)
