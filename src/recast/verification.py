"""Proof beyond weights: the same answer of the network (level 2), the same picture (level 3).

    split      original   against   residual, with the adapter as LoRA loaders apply it
    rebuild    original with what was trained in its layers   against   the written file

The two networks are opened one after the other, so that memory holds one. Bounds: relative error of
the text condition and of the UNet's output FORWARD, pictures PICTURE dB, by the coarsest dtype of
the compared weights; weights that are off by their rounding stay far below.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from recast.errors import Refused

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from recast.adapter import Adapter
    from recast.checkpoint import Checkpoint
    from recast.model import Model

FORWARD = {"F32": 1e-3, "F16": 1e-2, "BF16": 5e-2}
PICTURE = {"F32": 50.0, "F16": 30.0, "BF16": 20.0}
PROMPT = "a photo of a red barn under a blue sky"


@dataclass(frozen=True)
class Likeness:
    """Relative errors of text condition and output; dB between pictures, None below level 3."""

    condition: float
    output: float
    psnr: float | None
    forward_bound: float
    psnr_bound: float

    @property
    def passed(self) -> bool:
        """All within their bounds."""
        alike = self.psnr is None or self.psnr >= self.psnr_bound
        return max(self.condition, self.output) <= self.forward_bound and alike


@dataclass(frozen=True)
class Question:
    """What both networks are asked: level 2 or 3, a prompt, a seed, and how to run."""

    level: int = 2
    prompt: str = PROMPT
    seed: int = 0
    steps: int = 12
    size: int | None = None
    device: str = "cpu"

    def parts(self, layout_parts: tuple[str, ...]) -> tuple[str, ...]:
        """The networks that are needed."""
        return ("unet", *layout_parts, *(("vae",) if self.level > 2 else ()))


@dataclass(frozen=True)
class Answer:
    """Text context, UNet output at the middle of the path, and the picture."""

    context: Tensor
    output: Tensor
    picture: Tensor | None


def split_answers(
    original: Checkpoint, residual: Checkpoint, adapter: Adapter, question: Question
) -> Likeness:
    """Ask the original, then the residual with the adapter on top."""
    from recast.adapter import Adapter, attach
    from recast.adapter.places import refuse_partial
    from recast.model.load import load_part
    from recast.model.parts import Parts

    refuse_partial(residual, adapter.entries)
    model = _opened(original, question)
    wanted = answer(model, question)
    openers = {
        name: partial(load_part, residual, model.layout, name, model.dtype, model.device)
        for name in model.parts
    }
    for name in openers:
        del model.parts[name]  # the original's networks go before the residual's are opened
    parts = Parts(openers, model.device)
    # beside a residual the factors are a change like any LoRA's
    change = Adapter(adapter.entries, {"recast.role": "delta"})
    model = replace(model, parts=parts)
    attach(_trainable(parts), change, model.layout.sites("every"))
    return _likeness(wanted, answer(model, question), _coarsest(residual, adapter))


def rebuilt_answers(
    original: Checkpoint,
    rebuilt: Checkpoint,
    initial: Adapter | None,
    trained: Adapter | None,
    question: Question,
) -> Likeness:
    """Ask the original with what was trained, then the written file; both as the file's kind."""
    from recast.adapter import attach

    model = _opened(rebuilt, question)
    objective, got = model.objective, answer(model, question)
    del model
    model = replace(_opened(original, question), objective=objective)
    if trained is not None:
        sites = model.layout.sites("every")
        attach(_trainable(model.parts), trained, sites, initial=initial)
    return _likeness(answer(model, question), got, _coarsest(rebuilt, trained))


def answer(model: Model, question: Question) -> Answer:
    """What a model says to the question."""
    import torch

    from recast.sample import sample_images

    made = torch.Generator().manual_seed(question.seed)
    with torch.no_grad():
        condition = model.condition([question.prompt], size=question.size)
        shape = (1, *model.latent_shape(question.size))
        x = torch.randn(shape, generator=made).to(model.device)
        output = model.net(condition)(x, torch.tensor([0.5]))
        picture = None
        if question.level > 2:
            pixels = None if question.size is None else (question.size, question.size)
            painted = sample_images(
                model, [question.prompt], seeds=[question.seed], steps=question.steps, size=pixels
            )
            picture = next(iter(painted)).image
    return Answer(condition.context.cpu(), output.cpu(), picture)


def _opened(checkpoint: Checkpoint, question: Question) -> Model:
    from recast.layout import detect
    from recast.model import open_model

    if question.level not in (2, 3):
        raise Refused(f"level {question.level}: choose 1 (weights), 2 (forward) or 3 (picture).")
    parts = question.parts(detect(checkpoint).text_parts)
    return open_model(checkpoint, device=question.device, parts=parts, lazily=True)


def _trainable(parts: Mapping[str, torch.nn.Module]) -> dict[str, torch.nn.Module]:
    return {name: module for name, module in parts.items() if name != "vae"}


def _coarsest(file: Checkpoint, adapter: Adapter | None) -> str:
    """The dtype with the largest rounding error among the weights that an adapter changed."""
    from recast.adapter.places import places

    keys = places(file, adapter.entries) if adapter is not None else file.specs
    found = {file.specs[key].dtype for key in keys}
    return max(found & FORWARD.keys(), key=lambda name: FORWARD[name], default="BF16")


def _likeness(wanted: Answer, got: Answer, dtype: str) -> Likeness:
    psnr = None
    if wanted.picture is not None and got.picture is not None:
        gap = (wanted.picture - got.picture).double().square().mean().item()
        psnr = (
            float("inf") if gap == 0 else -10 * math.log10(gap / 4)
        )  # pictures reach from -1 to 1
    return Likeness(
        _off(wanted.context, got.context), _off(wanted.output, got.output), psnr,
        FORWARD[dtype], PICTURE[dtype],
    )  # fmt: skip


def _off(wanted: Tensor, got: Tensor) -> float:
    gap = (wanted.double() - got.double()).norm().item()
    whole = wanted.double().norm().item()
    return gap / whole if whole else float("inf" if gap else 0)
