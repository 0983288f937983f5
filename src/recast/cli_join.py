"""The verbs that put files together and say what they are: merge, join, mark."""

from __future__ import annotations

import math
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recast import console
from recast.cli_common import Force, Json, model_path
from recast.cli_lora import Of, ranges
from recast.errors import Refused
from recast.show import show_file

if TYPE_CHECKING:
    from recast.adapter.merge import Weights


def merge(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Checkpoints that predict the same; the result has the first one's dtypes and "
            "markers. Or a TOML file with a tree of merges."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The checkpoint to write.")],
    how: Annotated[
        str,
        typer.Option(
            help="weighted, difference (A + w (B - C)), slerp, cosine, ties, dare or dare-ties."
        ),
    ] = "weighted",
    weight: Annotated[
        list[str] | None,
        typer.Option(
            help="B's share: 0.5 (the default), of a part or block as te=0, OUT08=1.0, as a "
            "vector mbw:0.5,0,1 …; may be given again, the last that fits counts. Of several "
            "models one for each after the first, as 0.2,OUT08=1."
        ),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(help="Of ties, dare, dare-ties: the share of changes that stays."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of dare: which changes stay.")] = 0,
    lora: Annotated[
        list[Path] | None, typer.Option(help="An adapter to add; may be given again.")
    ] = None,
    strength: Annotated[
        list[float] | None, typer.Option(help="Of --lora: once, or for each in order.")
    ] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Mix checkpoints that predict the same, block by block, and add adapters to them.

    Example: recast merge flow.safetensors base-flow.safetensors --weight 0.3 --weight OUT08=0
    --out mixed.safetensors
    """
    from recast.surgery.merging import write_merge
    from recast.surgery.recipes import Added, Step, read_tree

    if len(models) == 1 and models[0].endswith(".toml"):
        if weight or lora or density or how != "weighted":
            raise Refused("a TOML file says how to merge: leave out the other options.")
        step = read_tree(Path(models[0]))
    else:
        paths = tuple(map(model_path, models))
        strengths = each(strength or [1.0], len(lora or ()), "--strength")
        added = tuple(Added(path, one) for path, one in zip(lora or (), strengths, strict=True))
        if len(paths) == 1 and added:
            if weight or density or how != "weighted":
                raise Refused("one model and adapters: give --strength, not how to merge models.")
            step = Step("lora", paths, adapters=added)
        else:
            step = Step(how, paths, _weights(how, weight, len(paths)), density or _density(how),
                        seed)  # fmt: skip
            step = Step("lora", (step,), adapters=added) if added else step
    write_merge(step, out, force=force)
    facts = {
        "file": str(out),
        "how": step.how,
        "weights": step.weights[0].texts()
        if len(step.weights) == 1
        else [",".join(one.texts()) for one in step.weights],
    }
    console.emit(facts) if json else show_file(facts)


def _weights(how: str, given: list[str] | None, count: int) -> tuple[Weights, ...]:
    """A merge's weights from the options; the defaults are those of `_usual`."""
    from recast.surgery.recipes import EACH, parse_weights

    wanted = count - 1 if how in EACH else 1
    usual = _usual(how, count)
    if not given:
        return (parse_weights(usual),) * wanted
    if wanted > 1:
        if len(given) != wanted:
            raise Refused(f"--weight is given {len(given)} times for {wanted} models after the "
                          "first: give one for each.")  # fmt: skip
        return tuple(parse_weights(text) for text in given)
    if any(text.startswith("mbw:") for text in given):
        if len(given) > 1:
            raise Refused("--weight mbw: has every block's weight: give it alone.")
        return (parse_weights(given[0]),)
    return (parse_weights(",".join([f"{usual:g}", *given])),)


def _usual(how: str, count: int) -> float:
    """The weight without --weight: all models alike, or the whole change."""
    if how in ("weighted", "slerp", "cosine"):
        return 1 / max(count, 1)
    return 1 / max(count - 1, 1) if how == "dare" else 1.0


def _density(how: str) -> float:
    """The papers' usual densities."""
    return {"ties": 0.2, "dare": 0.5, "dare-ties": 0.5}.get(how, 1.0)


def join(
    adapters: Annotated[
        list[Path], typer.Argument(help="Adapter files of any format, or PEFT folders.")
    ],
    out: Annotated[Path, typer.Option(help="The file to write; for peft a folder.")],
    strength: Annotated[
        list[float] | None,
        typer.Option(help="Times this, of any sign; once, or for each adapter in order."),
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            help="Weights by block on top, as OUT*=0.5,TE1=0; once, or for each in order."
        ),
    ] = None,
    vector: Annotated[
        list[str] | None,
        typer.Option(help="The same as a block vector or a preset's name; see chop."),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Re-factor the sum to this rank; all of it otherwise.")
    ] = None,
    conv_rank: Annotated[
        int | None, typer.Option(help="The same for kernels larger than 1x1.")
    ] = None,
    rule: Annotated[
        str | None, typer.Option(help="Re-factor by sv_ratio=20, sv_cumulative=0.9, sv_fro=0.9.")
    ] = None,
    model: Of = None,
    to: Annotated[
        str | None, typer.Option(help="kohya, peft, diffusers or comfy; the files' own otherwise.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="fp32, fp16 or bf16; the files' own otherwise.")
    ] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Add adapters up: one file that changes a model as all of them together.

    Example: recast join style.safetensors face.safetensors --strength 0.7 --strength 1
    --out both.safetensors
    """
    from recast.cli_common import dtype_of
    from recast.layout import open_checkpoint
    from recast.layout.loras import FORMATS
    from recast.surgery.join import Input
    from recast.surgery.join import join as join_files
    from recast.surgery.rules import cut
    from recast.surgery.weights import Weights, parse

    if to is not None and to not in FORMATS:
        raise Refused(f"{to!r} is no adapter format: choose {', '.join(FORMATS)}.")
    form = None if dtype is None else dtype_of("--dtype", dtype)
    count = len(adapters)
    strengths = each(strength or [1.0], count, "--strength")
    odd = [number for number in strengths if not math.isfinite(number)]
    if odd:
        raise Refused(f"--strength {odd[0]}: give a finite number.")
    given = each(weights or [""], count, "--weights")
    vectors = each(vector or [""], count, "--vector")
    inputs = [
        Input(path, w, parse(text) if text else Weights(), one or None)
        for path, w, text, one in zip(adapters, strengths, given, vectors, strict=True)
    ]
    chosen = cut(rank, conv_rank, rule) if rank or conv_rank or rule else None
    with ExitStack() as files:
        base = files.enter_context(open_checkpoint(model_path(model))) if model else None
        done = join_files(inputs, out, cut=chosen, base=base, form=to, dtype=form, force=force)
    facts = {
        "files": [str(path) for path in done.files],
        "bytes": sum(path.stat().st_size for path in done.files),
        "modules": done.modules,
        "in_several": done.shared,
        "ranks": ranges(done.ranks or [0]),
    }
    console.emit(facts) if json else show_file(facts)


def each(given: list[Any], count: int, option: str) -> list[Any]:
    """An option's values for each of several files; one is for all."""
    if len(given) not in (1, count) or (count == 0 and given != [1.0]):
        raise Refused(f"{option} is given {len(given)} times for {count} files: once, or each.")
    return given * count if len(given) == 1 else given


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


VERBS = (merge, join, mark)
