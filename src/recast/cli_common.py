"""What several verbs share: the meaning of their arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from recast import processes
from recast.errors import Refused

Model = Annotated[
    str,
    typer.Argument(
        help="A checkpoint file or diffusers folder; or pocket-xl or pocket-15, which ship with "
        "Recast."
    ),
]
Out = Annotated[Path, typer.Option(help="Folder of the run; the same command resumes it.")]
Recipe = Annotated[str, typer.Option(help="A recipe that ships with Recast, or a TOML file.")]
Steps = Annotated[
    str | None,
    typer.Option(
        metavar="INTEGER|auto",
        help="Training steps; auto: until the validation stops improving; the recipe's otherwise.",
    ),
]
Judge = Annotated[
    list[Path] | None,
    typer.Option(
        help="Folder of a CLIP or DINOv2 model: adds the CLIP score or FD-DINOv2; may be given "
        "again."
    ),
]
Base = Annotated[
    str | None,
    typer.Option(help="The frozen weights in training: full, 8bit, 4bit; the recipe's otherwise."),
]
Seed = Annotated[int | None, typer.Option(help="Seed of data order, noise and times.")]
Source = Annotated[
    str | None,
    typer.Option(help="What MODEL predicts, where its file is silent or contradicts itself."),
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1 … (default: cuda if there is one).")
]
Force = Annotated[bool, typer.Option("--force", help="Replace files that exist.")]
Far = Annotated[
    bool, typer.Option("--far", help="Take the patch however far MODEL is from its base.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
SkipBroken = Annotated[
    bool, typer.Option("--skip-broken", help="Leave out broken images, naming them.")
]
VaeScale = Annotated[
    float | None,
    typer.Option(help="Latents are (z - shift) scale, where the VAE does not say so."),
]
VaeShift = Annotated[float | None, typer.Option(help="See --vae-scale; 0 otherwise.")]


def model_path(name: str) -> Path:
    """A checkpoint's path, or the file of one that ships with Recast."""
    from recast import pocket

    return pocket.path(name) if name in pocket.NAMES else Path(name)


def vae_path(name: str) -> Path:
    """A VAE's path, or the file of the one that ships with Recast."""
    from recast import pocket

    return pocket.VAE if name == pocket.VAE.stem else Path(name)


def device_of(name: str | None) -> str:
    """The device asked for, or the GPU where there is one.

    Raises Refused for a device that this machine does not have.
    """
    import torch

    if name is None:
        if torch.cuda.is_available():
            return f"cuda:{processes.local()}" if processes.several() else "cuda"
        return "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise Refused(
            f"--device {name} cannot be used here ({reason}): leave it out, or give cpu."
        ) from error
    return name


def dtype_of(option: str, name: str) -> str:
    """fp16 as the file format calls it; raises Refused for anything else."""
    names = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
    if name not in names:
        raise Refused(f"{option} {name!r}: choose {', '.join(names)}.")
    return names[name]
