"""Weights shared out among processes, as `accelerate launch --use_fsdp` asks: what can be, and how.

Layers that are trained whole need it: for SDXL's UNet masters, gradients and AdamW's moments take
41 GB, which each of n processes then has an n-th of.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from recast import processes
from recast.convert.networks import kind_of, text_end
from recast.errors import Refused
from recast.events import Note
from recast.recipe import Recipe

if TYPE_CHECKING:
    from recast.model import Model

BY_NUMBER = ("adamw", "lion")  # optimizers that treat every number by itself


def check(recipe: Recipe) -> None:
    """Refuse what needs all of a tensor at once, or is of no use beside shared weights."""
    if kind_of(recipe) != "full":
        raise Refused(
            "FSDP shares out layers that are trained whole (train.rank 0, network.kind full): "
            "factors are small, launch with --multi_gpu instead."
        )
    if os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
        raise Refused("FSDP keeps weights on their device here: leave --fsdp_offload_params out.")
    for key, wanted, found in unfit(recipe):
        raise Refused(
            f"{key} {found} does not go with weights that are shared out: set it to {wanted}, or "
            "launch with --multi_gpu instead of FSDP."
        )


def unfit(recipe: Recipe) -> Iterator[tuple[str, str, object]]:
    """(key, what it would have to be, what it is)."""
    how = recipe.train
    if how.optimizer not in BY_NUMBER:
        yield "train.optimizer", " or ".join(BY_NUMBER), how.optimizer
    if how.optimizer_args.get("use_gc"):
        yield "train.optimizer_args.use_gc", "false", "true"
    if how.masters != "fp32":
        yield "train.masters", "fp32", how.masters
    if how.precision == "fp16":
        yield "train.precision", "bf16", how.precision
    if how.base != "full":
        yield "train.base", "full", how.base
    if how.compile:
        yield "train.compile", "false", "true"
    if how.channels_last:
        yield "train.channels_last", "false", "true"
    if how.widen:
        yield "train.widen", '""', how.widen
    if text_end(recipe) < how.limit:
        yield "network.text_stop", "0", text_end(recipe)


def spread(model: Model) -> Iterator[Note]:
    """Share out the UNet, if the launch asks for it.

    Text encoders stay whole: transformers finds its hidden states by the class of the encoder,
    which torch exchanges.
    """
    if not processes.sharing():
        return
    from recast.train.shards import spread

    model.parts = dict(model.parts)  # what is shared out stays on its device
    spread(model.unet, model.device)
    yield Note(f"The UNet's weights are shared out among {processes.count()} processes.")


@contextmanager
def together() -> Iterator[None]:
    """Inside, a connection that breaks while weights are gathered means a process has ended."""
    try:
        yield
    except RuntimeError as error:
        if processes.sharing() and processes.broken(error):
            raise processes.Left from error
        raise
