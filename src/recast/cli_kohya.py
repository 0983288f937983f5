"""The verbs for those who come with their own settings: kohya, recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recast import console
from recast.cli_common import Device, Force, Json, SkipBroken, Source, device_of, model_path
from recast.errors import Refused
from recast.show import say

if TYPE_CHECKING:
    from recast.kohya import Told, Translation
    from recast.recipe import Recipe as RecipeModel


def kohya(
    words: Annotated[
        list[str] | None,
        typer.Argument(help="Behind --: the command, accelerate launch … train_network.py …"),
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="Read the command from this .txt, .bat or .sh instead.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Instead of --pretrained_model_name_or_path.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Instead of --train_data_dir and --dataset_config.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run, instead of OUTPUT_DIR/OUTPUT_NAME.")
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(min=8, help="Pixels instead of --resolution's; bucket limits in proportion."),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps instead.")] = None,
    save_recipe: Annotated[
        Path | None, typer.Option(help="Write the recipe to this file and train nothing.")
    ] = None,
    source: Source = None,
    device: Device = None,
    skip_broken: SkipBroken = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Run a training command that was written for kohya's sd-scripts.

    Says what each flag became, what has no effect here and why; refuses what cannot be honoured.

    Example: recast kohya --file train.bat --save-recipe mine.toml
    """
    from recast.kohya import begun, local, localised, read_command, scaled, translate
    from recast.recipe import override

    if (file is None) == (not words):
        raise Refused("give the command behind --, or the file that holds it as --file.")
    found = translate(read_command(file) if file else words or ())
    recipe = begun(localised(found.recipe))
    recipe = override(recipe if size is None else scaled(recipe, size), steps=steps)
    model = model or found.model
    images = images or (local(found.images) if found.images else None)
    out = out or (local(found.out) if found.out else None)
    for line in table(found) if not json else ():
        say(line)
    if save_recipe is not None:
        write_recipe(save_recipe, recipe, force=force)
        if json:
            console.emit({**facts(found), "recipe": str(save_recipe)})
        else:
            say(f"wrote {save_recipe}")
        return
    if model is None or images is None or out is None:
        raise Refused(
            "the command names no model, images or --output_dir: give --model, --images, --out."
        )
    from recast.convert import Job, run

    job = Job(
        model_path(str(local(model))), out, recipe, images=images, source=source,
        device=device_of(device), skip_broken=skip_broken, force=force, measure=False,
    )  # fmt: skip
    with console.stoppable() as stopped:
        console.follow(run(job, stopped))
    files = {path.stem: str(path) for path in sorted(out.glob("*.safetensors"))}
    if json:
        console.emit({**facts(found), "files": files})
    else:
        for name, path in files.items():
            say(f"{name:<9} {path}")


def table(found: Translation) -> list[str]:
    """Every flag with what became of it, those without effect behind the others."""
    kept = [one for one in found.told if not one.why]
    rest = [one for one in found.told if one.why]
    width = max((len(spelled(one)) for one in found.told), default=0)
    width = min(width, 44)
    return [f"{spelled(one):<{width}}  {became(one)}" for one in (*kept, *rest)]


def spelled(one: Told) -> str:
    """A flag and its value as they may be written."""
    if one.value is True:
        return f"--{one.flag}"
    values = one.value if isinstance(one.value, list) else [one.value]
    return " ".join([f"--{one.flag}", *map(str, values)])


def became(one: Told) -> str:
    if one.why:
        return f"no effect: {one.why}"
    return ", ".join(f"{key} = {shown(value)}" for key, value in one.settings.items())


def shown(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {shown(said)}" for key, said in value.items()) + " }"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def facts(found: Translation) -> dict[str, Any]:
    """The translation for scripts."""
    return {
        "model": found.model,
        "images": found.images,
        "out": found.out,
        "flags": [
            {"flag": one.flag, "value": one.value, "became": one.settings, "why": one.why}
            for one in found.told
        ],
    }


def write_recipe(path: Path, recipe: RecipeModel, *, force: bool) -> None:
    """Write what a recipe says that the default does not."""
    from recast.commit import commit, refuse_target
    from recast.recipe import dump_short

    refuse_target(path, force=force)
    text = dump_short(recipe).encode()
    commit(path, lambda file: file.write(text), size=len(text), force=force)


def recipe(
    action: Annotated[str, typer.Argument(help="list, show or check.")],
    name: Annotated[
        str | None, typer.Argument(help="A recipe that ships with Recast, or a TOML file.")
    ] = None,
    json: Json = False,
) -> None:
    """List the recipes that ship, show one in full, check a file of your own.

    Example: recast recipe show fast-80
    """
    from recast.recipe import differences, dump_toml, load, presets

    if action == "list":
        about = {each: load(each).about for each in presets()}
        if json:
            console.emit(about)
        for each, text in () if json else about.items():
            say(f"{each:<22} {text}")
        return
    if action not in ("show", "check"):
        raise Refused(f"there is no recast recipe {action}: give list, show or check.")
    if name is None:
        raise Refused(f"recast recipe {action} needs the recipe's name or file.")
    found = load(name)
    if json:
        console.emit(found.model_dump())
    elif action == "show":
        say(dump_toml(found).rstrip("\n"))
    else:
        changed = differences(found, load())
        say(f"{name} is a valid recipe: {found.about}")
        for key in changed:
            section, _, field = key.partition(".")
            value = found.model_dump()[section]
            for part in field.split("."):
                value = value.get(part) if isinstance(value, dict) else value
            say(f"  {key} = {shown(value)}")


VERBS = (kohya, recipe)
