"""The verbs that make adapters smaller or take them apart: resize, slice."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recast import console
from recast.cli_common import Force, Json, model_path
from recast.cli_lora import Of, ranges
from recast.errors import Refused
from recast.show import say, show_file

if TYPE_CHECKING:
    from recast.surgery.resize import Resized
    from recast.surgery.rules import Cut
    from recast.surgery.scores import Recipe
    from recast.surgery.slicing import Sliced
    from recast.surgery.traits import Trait


def resize(
    adapter: Annotated[Path, typer.Argument(help="An adapter file of any format, or PEFT folder.")],
    out: Annotated[
        Path, typer.Option(help="The file to write; of several recipes a folder for the files.")
    ],
    rank: Annotated[int | None, typer.Option(help="The rank, or with --rule the most.")] = None,
    conv_rank: Annotated[
        int | None, typer.Option(help="The same for kernels larger than 1x1.")
    ] = None,
    rule: Annotated[
        str | None, typer.Option(help="sv_ratio=20, sv_cumulative=0.9 or sv_fro=0.9.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Scores over all layers, as fro_ckpt=1,thr=-3.5 or spn_ckpt,size=50,per_byte; "
            "several with : between."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The checkpoint that recipes measure against.")
    ] = None,
    any_base: Annotated[
        bool, typer.Option("--any-base", help="Even if the adapter was made on another checkpoint.")
    ] = False,
    like_kohya: Annotated[
        bool, typer.Option("--like-kohya", help="With --rule: one rank more, as sd-scripts keeps.")
    ] = False,
    to: Annotated[
        str | None, typer.Option(help="kohya, peft, diffusers or comfy; the file's own otherwise.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="fp32, fp16 or bf16; the file's own otherwise.")
    ] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Write an adapter with less rank: the best that so many numbers can hold.

    Example: recast resize lora.safetensors --recipe fro_ckpt=1,thr=-3.55 --model model.safetensors
    --out small.safetensors
    """
    from recast.cli_common import dtype_of
    from recast.layout import open_checkpoint
    from recast.layout.loras import FORMATS
    from recast.surgery.resize import resize as resize_file

    if to is not None and to not in FORMATS:
        raise Refused(f"{to!r} is no adapter format: choose {', '.join(FORMATS)}.")
    form = None if dtype is None else dtype_of("--dtype", dtype)
    outs = _targets(adapter, out, to, recipe, _cut(rank, conv_rank, rule, recipe, like_kohya))
    with ExitStack() as files:
        base = files.enter_context(open_checkpoint(model_path(model))) if model else None
        done = resize_file(
            adapter, outs, base=base, form=to, dtype=form, any_base=any_base, force=force
        )
    facts = [_facts(one, adapter) for one in done]
    if json:
        console.emit(facts)
        return
    for each in facts:
        show_file(each)


def slice(
    adapters: Annotated[
        list[Path], typer.Argument(help="Adapter files or PEFT folders; several are joined.")
    ],
    out: Annotated[Path, typer.Option(help="The file to write; with --split a folder.")],
    trait: Annotated[
        list[str] | None,
        typer.Option(
            help="unet, te, te1, te2, content, style, layout, or one of --traits; of several "
            "adapters, one for each in order."
        ),
    ] = None,
    traits: Annotated[
        Path | None, typer.Option(help="A JSON file of traits, as blora_for_kohya's.")
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option(help="A glob or piece of a name that is kept.")
    ] = None,
    drop: Annotated[
        list[str] | None, typer.Option(help="A glob or piece of a name that is left out.")
    ] = None,
    te: Annotated[
        Path | None, typer.Option("--te", help="Take the text encoders from this adapter.")
    ] = None,
    strength: Annotated[
        list[float] | None, typer.Option(help="Times this; once, or for each adapter in order.")
    ] = None,
    split: Annotated[
        bool, typer.Option("--split", help="A file for each trait, or for each network.")
    ] = False,
    model: Of = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Take modules out of adapters by their names, or join adapters of different modules.

    Example: recast slice lora.safetensors --trait style --out style.safetensors
    """
    from recast.cli_lora import _layout
    from recast.surgery.slicing import Cutting, assemble, split_up
    from recast.surgery.traits import named

    layout = _layout(model)
    chosen = named(trait or (), traits)
    if split:
        odd = [name for name, given in (("--keep", keep), ("--drop", drop), ("--te", te),
                                        ("--strength", strength)) if given]  # fmt: skip
        if odd or len(adapters) > 1:
            raise Refused(
                f"--split takes one adapter and traits: leave out {(odd or ['others'])[0]}."
            )
        named_traits = dict(zip(trait, chosen, strict=True)) if trait else None
        done = split_up(adapters[0], out, named_traits, layout=layout, force=force)
    else:
        each = _shared(chosen, tuple(keep or ()), tuple(drop or ()), len(adapters))
        strengths = _each(strength or [1.0], len(adapters), "--strength")
        cuttings = [
            Cutting(path, tuple(wanted), factor)
            for path, wanted, factor in zip(adapters, each, strengths, strict=True)
        ]
        done = assemble(cuttings, out, texts=te, layout=layout, force=force)
    _show(done, json=json)


def _cut(
    rank: int | None, conv_rank: int | None, rule: str | None, recipe: str | None, like_kohya: bool
) -> Cut | None:
    """The rule of single modules, None where a recipe is given instead."""
    from recast.surgery.rules import cut

    if recipe is None:
        return cut(rank, conv_rank, rule, like_kohya)
    if rank or conv_rank or rule or like_kohya:
        raise Refused("a recipe says what is kept: leave out --rank, --conv-rank and --rule.")
    return None


def _targets(
    adapter: Path, out: Path, to: str | None, recipe: str | None, cut: Cut | None
) -> list[tuple[Path, Cut | Recipe]]:
    """What is written where: of several recipes, files in a folder that are named by them."""
    from recast.surgery.scores import recipes

    if cut is not None:
        return [(out, cut)]
    found = recipes(recipe or "")
    if len(found) == 1:
        return [(out, found[0])]
    folder = to == "peft" or (to is None and adapter.is_dir())
    tail = "" if folder else ".safetensors"
    named = {
        f"{adapter.stem}-{one.text.replace('=', '').replace(',', '-')}{tail}": one for one in found
    }
    if len(named) < len(found):
        raise Refused(f"--recipe {recipe} has one recipe twice: give each once.")
    return [(out / name, one) for name, one in named.items()]


def _facts(done: Resized, adapter: Path) -> dict[str, Any]:
    files = [path for path in done.files if path.suffix == ".safetensors"]
    return {
        "files": [str(path) for path in done.files],
        "bytes": sum(path.stat().st_size for path in files),
        "modules": done.modules,
        "vanished": len(done.vanished),
        "ranks": ranges(done.ranks or [0]),
        "relative_error": round(done.error, 6),
        "lowest_score": None if done.lowest is None else round(done.lowest, 6),
    }


def _shared(
    chosen: list[Trait], keep: tuple[str, ...], drop: tuple[str, ...], count: int
) -> list[list[Trait]]:
    """The traits of each adapter: one each in order, or all for a single one.

    keep adds to each of them, drop takes from each.
    """
    from recast.surgery.traits import Trait

    parted = (
        [chosen] if count == 1 else [[one] for one in _each(chosen or [None], count, "--trait")]
    )
    found = []
    for mine in parted:
        wanted = [one for one in mine if one] + ([Trait(keep)] if keep else [])
        if drop and not wanted:
            wanted = [Trait(("*",))]
        found.append([Trait(one.whitelist, (*one.blacklist, *drop)) for one in wanted])
    return found


def _each(given: list[Any], count: int, option: str) -> list[Any]:
    if len(given) not in (1, count):
        raise Refused(f"{option} is given {len(given)} times for {count} adapters: once, or each.")
    return given * count if len(given) == 1 else given


def _show(done: Sliced, *, json: bool) -> None:
    counts = {str(path): count for path, count in done.modules.items()}
    if json:
        console.emit({"files": [str(path) for path in done.files], "modules": counts})
        return
    for path, count in counts.items():
        say(f"{path}: {count} modules")
    for path in map(str, done.files):
        if path not in counts:
            say(path)


VERBS = (resize, slice)
