"""Opening a checkpoint: every parameter of every module is set once from the file, or none is.

Modules are built without memory for their weights and filled one tensor at a time.  Weights are
frozen; adapters bring their own.  The VAE stays in float32 whatever the precision of the rest:
SDXL's overflows in fp16, and it is small.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from recast.checkpoint import Checkpoint
from recast.errors import Refused
from recast.layout import Layout, detect, from_file, keymap, open_checkpoint
from recast.layout.names import PART_NAMES
from recast.markers import read_objective
from recast.model.networks import Model
from recast.model.parts import Parts
from recast.objective import OBJECTIVES
from recast.quantise import Quantiser

SIZES = {"sdxl": 1024, "sd15": 512}
SIZE_KEY = "recast.size"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def open_model(
    source: str | Path | Checkpoint,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    parts: Iterable[str] | None = None,
    objective: str | None = None,
    quantiser: Quantiser | None = None,
    lazily: bool = False,
    together: bool = False,
) -> Model:
    """Open the networks of a file or folder; `parts` must be there, None takes all that are.

    `lazily` opens each when it is first asked for, and one kind at a time is on the device, unless
    they shall be `together` (see `parts.Parts`); what does not fit is refused only then.

    The objective is read from the file's markers; `objective` overrides them.  A `quantiser` takes
    the layers that it wants, each as it is read.  Raises Refused where markers contradict each
    other, a part is missing, or names and shapes do not match one to one.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    if dtype not in DTYPES:
        raise Refused(
            f"{dtype} is no precision to run a model in: choose float32, float16, bfloat16."
        )
    if checkpoint.metadata.get("recast.role") == "residual":
        raise Refused(
            f"{checkpoint.path} is a residual, without the principal parts that its adapter holds: "
            "give the original checkpoint."
        )
    layout = detect(checkpoint)
    chosen = OBJECTIVES[stated_objective(checkpoint, objective)]
    device = torch.device(device)
    openers = {
        part: partial(
            load_part, checkpoint, layout, part, torch.float32 if part == "vae" else dtype, device,
            quantiser,
        )
        for part in wanted(checkpoint, layout, parts)
    }  # fmt: skip
    return Model(
        checkpoint,
        layout,
        Parts(openers, device, together)
        if lazily
        else {part: read() for part, read in openers.items()},
        chosen,
        preferred_size(checkpoint, layout),
        dtype,
        device,
        layout.scaling,
        layout.shift,
    )


def usual_dtype(device: str | torch.device) -> torch.dtype:
    """The precision of a device where nobody asks for another: fp32 on a CPU, bf16 elsewhere."""
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


def stated_objective(checkpoint: Checkpoint, override: str | None = None) -> str:
    """Return the objective that a file states, or the override; refuses contradictions."""
    if override is not None:
        if override not in OBJECTIVES:
            raise Refused(f"{override!r} is no objective: choose from {', '.join(OBJECTIVES)}.")
        return override
    evidence = read_objective(checkpoint.specs, checkpoint.metadata)
    if evidence.objective is None or evidence.contradictions:
        said = "; ".join((*evidence.contradictions, *evidence.reasons))
        raise Refused(
            f"{checkpoint.path}: the file does not say clearly what it predicts ({said}): "
            "state it with --source."
        )
    return evidence.objective


def wanted(checkpoint: Checkpoint, layout: Layout, parts: Iterable[str] | None) -> list[str]:
    """Return the parts to open; refuses those that are asked for and absent."""
    there = ["unet", *layout.text_parts, *(["vae"] if layout.vae else [])]
    if parts is None:
        return there
    asked = list(parts)
    absent = [part for part in asked if part in layout.missing]
    if absent:
        names = " and no ".join(PART_NAMES[part] for part in absent)
        raise Refused(
            f"{checkpoint.path} has no {names}, which is needed here: give a full checkpoint."
        )
    return [part for part in asked if part in there]


def preferred_size(checkpoint: Checkpoint, layout: Layout) -> int:
    """Return the side in pixels that a checkpoint was trained at: its own word, or its family's."""
    stated = checkpoint.metadata.get(SIZE_KEY, "")
    if not stated:
        return SIZES[layout.family]
    if not stated.isdecimal() or not 8 <= int(stated[:6]) <= 16384:
        raise Refused(f"{checkpoint.path}: its {SIZE_KEY} is {stated[:20]!r}, no size in pixels.")
    return int(stated)


def load_part(
    checkpoint: Checkpoint,
    layout: Layout,
    part: str,
    dtype: torch.dtype,
    device: torch.device,
    quantiser: Quantiser | None = None,
) -> nn.Module:
    """Return one module with its weights, frozen, in evaluation mode."""
    module = build(layout, part)
    fill(module, from_file(keymap(layout), checkpoint, part), dtype, device, part, quantiser)
    return module.to(device).eval().requires_grad_(False)


def build(layout: Layout, part: str) -> nn.Module:
    """Return a module whose parameters are on the meta device; its other buffers are real."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        if part == "unet":
            from diffusers import UNet2DConditionModel

            return UNet2DConditionModel(**layout.unet)
        if part == "vae":
            from diffusers import AutoencoderKL

            return AutoencoderKL(**(layout.vae or {}))
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

        config = CLIPTextConfig(**layout.texts[layout.text_parts.index(part)])
        return CLIPTextModelWithProjection(config) if part == "te2" else CLIPTextModel(config)


def fill(
    module: nn.Module,
    tensors: Iterator[tuple[str, Tensor]],
    dtype: torch.dtype,
    device: torch.device,
    part: str,
    quantiser: Quantiser | None = None,
) -> None:
    """Set every parameter and stored buffer exactly once; refuses by name what does not fit.

    Layers that the quantiser takes are replaced as soon as their weight is read.
    """
    waiting = set(module.state_dict())
    for name, tensor in tensors:
        if name not in waiting:
            raise Refused(f"The {PART_NAMES[part]} has no place left for {name}.")
        above, _, leaf = name.rpartition(".")
        owner = module.get_submodule(above)
        place = getattr(owner, leaf)
        if place.shape != tensor.shape:
            raise Refused(
                f"The {PART_NAMES[part]}'s {name} is {tuple(tensor.shape)} in the file, "
                f"{tuple(place.shape)} in the network."
            )
        waiting.remove(name)
        if leaf == "weight" and quantiser and (layer := quantiser(part, above, owner, tensor)):
            module.set_submodule(above, layer)
            continue
        value = tensor.to(device=device, dtype=dtype, copy=True)  # rows of a stack share memory
        setattr(owner, leaf, nn.Parameter(value) if isinstance(place, nn.Parameter) else value)
    if waiting:
        first = ", ".join(sorted(waiting)[:5])
        raise Refused(
            f"The file leaves {len(waiting)} parameters of the {PART_NAMES[part]} unset: {first}."
        )
