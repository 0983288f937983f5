"""The verbs of a run: convert, train, report, demo."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recast import console, processes
from recast.cli_common import (
    Base,
    Device,
    Far,
    Force,
    Json,
    Judge,
    Model,
    Out,
    Recipe,
    Seed,
    SkipBroken,
    Source,
    Steps,
    VaeScale,
    VaeShift,
    device_of,
    model_path,
    vae_path,
)
from recast.cli_data import Missing, with_policy
from recast.errors import Refused
from recast.show import say, show

if TYPE_CHECKING:
    from recast.recipe import Recipe as RecipeModel


def convert(
    model: Model,
    out: Out,
    to: Annotated[
        str | None,
        typer.Option(
            help="What it shall predict: flow, v-zsnr, v, eps, x0; same: what it does already; the "
            "recipe's otherwise, of the default one flow."
        ),
    ] = None,
    vae: Annotated[
        Path | None,
        typer.Option(
            help="Convert into this VAE's latent space: a file, a vae folder, a checkpoint; or "
            "pocket-eq, which ships with Recast."
        ),
    ] = None,
    vae_scale: VaeScale = None,
    vae_shift: VaeShift = None,
    via: Annotated[
        list[str] | None,
        typer.Option(help="An objective on the way, a run of its own; may be given again."),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Images with .txt captions; none: the model dreams its own.")
    ] = None,
    pairs: Annotated[
        Path | None,
        typer.Option(help="A folder of recast dream, in place of dreams of the run's own."),
    ] = None,
    from_: Annotated[
        Path | None,
        typer.Option("--from", help="Begin with a related model's patch instead of from nothing."),
    ] = None,
    far: Far = False,
    recipe: Recipe = "default",
    judge: Judge = None,
    steps: Steps = None,
    seed: Seed = None,
    base: Base = None,
    source: Source = None,
    device: Device = None,
    skip_broken: SkipBroken = False,
    folder: Annotated[
        bool, typer.Option("--folder", help="Leave the model as a diffusers folder too: OUT/model.")
    ] = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Change what a checkpoint predicts, and measure what was kept.

    Writes model, patch, adapter and report into the run folder.

    Example: recast convert pocket-xl --to flow --out runs/flow
    """
    from recast.convert import Job, run

    how = recipe_of(recipe, to, steps, seed, judges=judge, base=base)
    job = Job(
        model_path(model), out, with_vae(how, vae, vae_scale, vae_shift), images=images,
        source=source, device=device_of(device), skip_broken=skip_broken,
        force=force, via=tuple(via or ()), start=from_, far=far, pairs=pairs,
    )  # fmt: skip
    with console.stoppable() as stopped:
        console.follow(run(job, stopped))
    if not processes.first():
        return
    if folder:
        from recast.model.folder import write_beside

        write_beside(out / "model.safetensors", out / "model", force=force)
    show_report(out, json)


def train(
    model: Model,
    images: Annotated[
        Path,
        typer.Argument(
            help="Images with .txt captions, or a dataset file of kohya's; see recast data."
        ),
    ],
    out: Out,
    recipe: Recipe = "train",
    network: Annotated[
        str | None,
        typer.Option(
            help="principal: the principal factors of every layer; lora: factors from zero; full: "
            "whole layers."
        ),
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of the principal adapter.")] = None,
    dim: Annotated[int | None, typer.Option(min=1, help="Rank of a LoRA's linear layers.")] = None,
    alpha: Annotated[
        float | None, typer.Option(help="A LoRA's change is scaled by alpha / dim.")
    ] = None,
    conv_dim: Annotated[
        int | None, typer.Option(min=0, help="Rank of a LoRA's convolutions; 0 leaves them out.")
    ] = None,
    conv_alpha: Annotated[float | None, typer.Option(help="Their alpha.")] = None,
    te: Annotated[
        bool, typer.Option("--te", help="Train the text encoders too, beside the recipe's layers.")
    ] = False,
    from_: Annotated[
        Path | None,
        typer.Option("--from", help="Go on from an adapter: any format, or a PEFT folder."),
    ] = None,
    far: Annotated[
        bool, typer.Option("--far", help="Go on even if it was made for another checkpoint.")
    ] = False,
    merge: Annotated[
        bool, typer.Option("--merge", help="Write the model with a LoRA merged in too.")
    ] = False,
    vae: Annotated[
        Path | None,
        typer.Option(
            help="Train in this VAE's latent space, and write it: a file, a vae folder, a "
            "checkpoint; or pocket-eq."
        ),
    ] = None,
    vae_scale: VaeScale = None,
    vae_shift: VaeShift = None,
    on_missing_caption: Missing = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    steps: Steps = None,
    seed: Seed = None,
    base: Base = None,
    source: Source = None,
    device: Device = None,
    skip_broken: SkipBroken = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Train a checkpoint on images: a network of low-rank factors, the model's own objective.

    Writes initial, adapter, patch and model into the run folder; of a LoRA adapter and lora.

    Example: recast train model.safetensors photos --rank 64 --out runs/photos
    """
    from recast.convert import Job, run
    from recast.recipe import override

    how = recipe_of(recipe, None, steps, seed, rank=rank, base=base)
    chosen = {"kind": network, "dim": dim, "alpha": alpha, "conv_dim": conv_dim,
              "conv_alpha": conv_alpha, "merge": merge or None,
              "weights": None if from_ is None else str(from_)}  # fmt: skip
    layers = f"{how.train.profile},te" if te else None
    how = with_vae(with_policy(how, on_missing_caption), vae, vae_scale, vae_shift)
    job = Job(
        model_path(model), out, override(how, lr=lr, profile=layers, network=chosen),
        images=images, source=source, far=far,
        device=device_of(device), skip_broken=skip_broken, force=force, measure=False,
    )  # fmt: skip
    with console.stoppable() as stopped:
        console.follow(run(job, stopped))
    if not processes.first():
        return
    files = {p.stem: str(p) for p in sorted(out.glob("*.safetensors"))}
    if json:
        console.emit(files)
    else:
        for name, path in files.items():
            say(f"{name:<9} {path}")


def report(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")], json: Json = False
) -> None:
    """Show a run's figures again, and write its page anew.

    Example: recast report runs/flow
    """
    from recast.evaluate.report import load_report, write_report

    loaded = load_report(run)
    write_report(run, loaded)
    show_report(run, json)


def demo(
    out: Annotated[Path, typer.Option(help="Folder of the demo's run.")] = Path("runs/demo"),
    images: Annotated[
        int, typer.Option(min=8, help="How many user pictures to paint first.")
    ] = 350,
) -> None:
    """Convert the shipped SDXL-layout checkpoint from eps to flow, in a few minutes on a CPU.

    Example: recast demo
    """
    import random

    from recast.pocket.world import SHAPES, scenes, write_folder

    folder = out / "images"
    if not (out / "images.complete").exists():
        absent = {SHAPES.index(name) for name in ABSENT}
        seen = [scene for scene in scenes(held=False) if scene.shape not in absent]
        write_folder(folder, random.Random(0).sample(seen, images), seed=0, marked_share=1 / 3)
        (out / "images.complete").touch()
    convert("pocket-xl", out=out, to="flow", images=folder)


def with_vae(
    recipe: RecipeModel, vae: Path | None, scale: float | None, shift: float | None
) -> RecipeModel:
    """A recipe with the command line's VAE; refuses numbers without what they are about."""
    from recast.recipe import override

    if vae is None:
        if not recipe.data.vae and (scale is not None or shift is not None):
            raise Refused("--vae-scale and --vae-shift say something of a VAE: give --vae too.")
    elif shift is not None and scale is None:
        raise Refused("--vae-shift without --vae-scale: give both.")
    elif scale is not None and scale <= 0:
        raise Refused(f"--vae-scale {scale:g}: give a number above 0.")
    named = None if vae is None else str(vae_path(str(vae)))
    data = {"vae": named, "vae_scale": scale, "vae_shift": shift}
    return override(recipe, data=data)


def show_report(out: Path, as_json: bool) -> None:
    """The table, then the four things a user wants to know: where, how to load, kept, lost."""
    from recast.evaluate.report import load_report

    loaded = load_report(out)
    if as_json:
        console.emit(loaded.as_json())
    else:
        show(loaded, out)


def recipe_of(
    name: str,
    to: str | None,
    steps: int | str | None,
    seed: int | None,
    *,
    rank: int | None = None,
    judges: list[Path] | None = None,
    base: str | None = None,
) -> RecipeModel:
    """A recipe with the command line's options laid over it."""
    from recast.recipe import load, override

    count = int(steps) if isinstance(steps, str) and steps.isdecimal() else steps
    folders = [str(folder) for folder in judges] if judges else None
    return override(
        load(name), objective=to, steps=count, seed=seed, rank=rank, judges=folders, base=base
    )


ABSENT = ("star", "ring", "moon")  # shapes that the demo's user pictures lack
VERBS = (convert, train, report)
