"""The verbs of the two-file workflow: split, rebuild, verify."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from recast import console
from recast.cli_common import Device, Force, Json, Model, device_of, dtype_of, model_path
from recast.errors import CheckFailed, Refused
from recast.show import show_file


def split(
    model: Model,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for adapter.safetensors and residual.safetensors."),
    ] = None,
    rank: Annotated[
        list[str] | None,
        typer.Option(
            help="64 (the default), full, energy:0.9, score:-3.55; of a part or block as te=16, "
            "OUT01=128; may be given again."
        ),
    ] = None,
    profile: Annotated[
        str,
        typer.Option(
            help="Which layers: lycoris-full, kohya-conv, all, te1, te2, or blocks such as "
            "OUT02,OUT08; those of a text encoder only if it will be trained too."
        ),
    ] = "lycoris-full",
    adapter_dtype: Annotated[str, typer.Option(help="fp32, fp16 or bf16.")] = "fp16",
    residual_dtype: Annotated[
        str | None, typer.Option(help="fp32, fp16 or bf16; the original's otherwise, fp16 for fp8.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="exact, or fast (0.5 % of the energy less at most); fast on a GPU."),
    ] = None,
    device: Device = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what each block would get, and the memory.")
    ] = False,
    resolution: Annotated[
        int | None, typer.Option(min=64, help="With --dry-run: pixels of a side in training.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="With --dry-run: pictures a step.")] = 1,
    force: Force = False,
    json: Json = False,
) -> None:
    """Take a checkpoint apart into a principal adapter and the residual that completes it.

    Example: recast split model.safetensors --rank 64 --out split
    """
    from recast.adapter.split import split as split_files
    from recast.cli_lora import ranges, show_forecast
    from recast.layout import detect, open_checkpoint
    from recast.layout.sites import MATRICES

    if out is None and not dry_run:
        raise Refused("split has no folder to write into: give --out, or --dry-run to only look.")
    rules, form = rank or ["64"], dtype_of("--adapter-dtype", adapter_dtype)
    with open_checkpoint(model_path(model)) as checkpoint:
        named = detect(checkpoint).sites(profile)
        # the norms and biases of a block stay in the residual
        sites = [s for s in named if s.param == "weight" and s.kind in MATRICES] or named
        if out is None or dry_run:
            show_forecast(checkpoint, sites, rules, form, resolution, batch, json=json)
            return
        made = split_files(
            checkpoint,
            sites,
            rules,
            out,
            adapter_dtype=form,
            residual_dtype=residual_dtype and dtype_of("--residual-dtype", residual_dtype),
            method=method,
            device=device_of(device),
            force=force,
        )
    facts = {
        "adapter": str(out / "adapter.safetensors"),
        "residual": str(out / "residual.safetensors"),
        "modules": len(made.energies),
        "ranks": ranges(made.ranks.values()),
        "energy": round(made.energy, 6),
        "methods": dict(made.methods),
        "adapter_sha256": made.adapter_sha256,
        "residual_sha256": made.residual_sha256,
        "note": TEXTS_SPLIT if any(site.part != "unet" for site in sites) else None,
    }
    console.emit(facts) if json else show_file(facts)


TEXTS_SPLIT = (
    "text encoders are split too: apply and train their adapters with the UNet's, or captions "
    "mean nothing"
)


def rebuild(
    original: Model,
    trained: Annotated[Path, typer.Option(help="The trained adapter.")],
    out: Annotated[Path, typer.Option(help="The checkpoint to write.")],
    folder: Annotated[
        bool, typer.Option("--folder", help="Write a diffusers folder in place of a file.")
    ] = False,
    initial: Annotated[
        Path | None,
        typer.Option(help="The adapter before training; none where the trained is a change."),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(help="What the result predicts; the original's objective otherwise."),
    ] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Write the original plus what training changed: W + (T - T0), rounded once.

    Example: recast rebuild model.safetensors --initial initial.safetensors
    --trained adapter.safetensors --out trained.safetensors
    """
    from recast.adapter import read_adapter
    from recast.adapter.rebuild import write_rebuilt
    from recast.layout import detect, open_checkpoint
    from recast.model.folder import through_file

    with open_checkpoint(model_path(original)) as checkpoint:
        layout = detect(checkpoint)
        start = read_adapter(initial, layout) if initial else None
        change = read_adapter(trained, layout)

        def write(path: Path) -> str:
            return write_rebuilt(checkpoint, start, change, path, objective=objective, force=force)

        sha256 = through_file(write, out) if folder else write(out)
    facts = {"file": str(out), "sha256": sha256}
    console.emit(facts) if json else show_file(facts)


def verify(
    original: Model,
    residual: Annotated[Path | None, typer.Option(help="A residual, with --adapter.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="The adapter of that residual.")] = None,
    rebuilt: Annotated[Path | None, typer.Option(help="A written checkpoint.")] = None,
    initial: Annotated[
        Path | None, typer.Option(help="With --rebuilt: the initial adapter.")
    ] = None,
    trained: Annotated[
        Path | None, typer.Option(help="With --rebuilt: the trained adapter.")
    ] = None,
    level: Annotated[
        int, typer.Option(min=1, max=3, help="1: weights; 2: a forward pass too; 3: a picture too.")
    ] = 1,
    tolerance: Annotated[float | None, typer.Option(help="Largest relative error allowed.")] = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Prove that files add up to a checkpoint, tensor by tensor; exit code 1 if they do not.

    Example: recast verify model.safetensors --residual split/residual.safetensors
    --adapter split/adapter.safetensors
    """
    from recast.adapter import read_adapter
    from recast.adapter.verify import verify_rebuilt, verify_split
    from recast.checkpoint import Checkpoint
    from recast.layout import detect, open_checkpoint
    from recast.verification import Question, rebuilt_answers, split_answers

    likeness = None
    with ExitStack() as files:
        source = files.enter_context(open_checkpoint(model_path(original)))
        layout = detect(source)
        if residual is not None and adapter is not None and rebuilt is None:
            parts = files.enter_context(Checkpoint(residual))
            factors = read_adapter(adapter, layout)
            verdict = verify_split(source, parts, factors, tolerance=tolerance)
            if level > 1:
                question = Question(level, device=device_of(device))
                likeness = split_answers(source, parts, factors, question)
        elif rebuilt is not None and residual is None and adapter is None:
            start = read_adapter(initial, layout) if initial else None
            change = read_adapter(trained, layout) if trained else None
            file = files.enter_context(open_checkpoint(rebuilt))
            verdict = verify_rebuilt(source, file, start, change, tolerance=tolerance or 0.0)
            if level > 1:
                question = Question(level, device=device_of(device))
                likeness = rebuilt_answers(source, file, start, change, question)
        else:
            raise Refused("give either --residual and --adapter, or --rebuilt.")
    passed = verdict.passed and (likeness is None or likeness.passed)
    facts = {
        "verdict": "passed" if passed else "failed",
        "tensors": len(verdict.tensors),
        "worst_tensor": verdict.worst.key,
        "worst_relative_error": verdict.worst.relative,
        "relative_error": verdict.relative,
        "bit_exact_share": verdict.exact,
        "tolerance": verdict.tolerance,
        "missing": list(verdict.missing),
        "surplus": list(verdict.surplus),
        "answers": dataclasses.asdict(likeness) if likeness else None,
    }
    console.emit(facts) if json else show_file(facts)
    if not verdict.passed:
        raise CheckFailed(
            f"{verdict.worst.key} is off by {verdict.worst.relative:.2e} of its norm, "
            f"and {verdict.tolerance:.0e} is allowed."
        )
    if likeness is not None and not likeness.passed:
        raise CheckFailed(
            f"the answers differ: text {likeness.condition:.1e}, output {likeness.output:.1e} of "
            f"their norms, {likeness.forward_bound:.0e} allowed"
            + (f"; pictures {likeness.psnr:.1f} dB." if likeness.psnr is not None else ".")
        )


VERBS = (split, rebuild, verify)
