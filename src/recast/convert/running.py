"""How the network computes while it trains: what is recomputed, compiled, laid out in memory.

None of it is part of what a run learns; all of it is undone at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from recast.adapter.routes import withheld
from recast.convert.networks import kind_of
from recast.errors import Refused
from recast.recipe import Recipe

if TYPE_CHECKING:
    from recast.adapter import Attached
    from recast.model import Model

BLOCKS = ("down_blocks", "mid_block", "up_blocks")
BACKEND = "inductor"  # of torch.compile


@contextmanager
def running(model: Model, attached: Attached, recipe: Recipe) -> Iterator[None]:
    """Set the networks up as the recipe says; layers that an adapter sits in are there already."""
    how = recipe.train
    networks = [model.unet, *trained_texts(model, attached)]
    with ExitStack() as undo:
        if how.channels_last:
            lay_out(model.unet, torch.channels_last)
            undo.callback(lay_out, model.unet, torch.contiguous_format)
        for network in networks if how.recompute else ():
            recompute(network)
            undo.callback(forgo, network)
        if how.compile:  # the compiler finds ways of its own, and none through these
            undo.enter_context(withheld(attached.routes))
        for block in blocks(model.unet) if how.compile else ():
            block.compile(backend=BACKEND)
            undo.callback(setattr, block, "_compiled_call_impl", None)
        yield


def lay_out(network: nn.Module, layout: torch.memory_format) -> None:
    """Bring the weights of convolutions into a memory layout; outputs follow theirs."""
    network.to(memory_format=layout)  # type: ignore[call-overload]


def trained_texts(model: Model, attached: Attached) -> list[nn.Module]:
    """The text encoders that gradients flow through."""
    layers = {id(spot.layer) for spot in attached.spots}
    texts = [model.parts[name] for name in model.text_parts if name in model.parts]
    return [text for text in texts if any(id(module) in layers for module in text.modules())]


def recompute(network: nn.Module) -> None:
    """Keep a block's input only, and run it again for the backward pass (Chen et al. 2016).

    Blocks before the first layer that is trained keep nothing anyway, and are not run again.
    """
    if hasattr(network, "enable_gradient_checkpointing"):
        network.enable_gradient_checkpointing()  # type: ignore[operator]
        return
    # transformers' encoders do so in training mode only; their own dropouts are 0
    network.train()
    newer = hasattr(network, "activation_checkpointing_enable")  # its name in newer transformers
    name = "activation_checkpointing_enable" if newer else "gradient_checkpointing_enable"
    getattr(network, name)({"use_reentrant": False})


def forgo(network: nn.Module) -> None:
    """Keep all activations again."""
    if hasattr(network, "disable_gradient_checkpointing"):
        network.disable_gradient_checkpointing()  # type: ignore[operator]
        return
    newer = hasattr(network, "activation_checkpointing_disable")
    name = "activation_checkpointing_disable" if newer else "gradient_checkpointing_disable"
    getattr(network, name)()
    network.eval()


def blocks(unet: nn.Module) -> list[nn.Module]:
    """The blocks of a UNet, from input to output."""
    found: list[nn.Module] = []
    for name in BLOCKS:
        block = getattr(unet, name)
        found += list(block) if isinstance(block, nn.ModuleList) else [block]
    return found


def check(recipe: Recipe, device: str) -> None:
    """Refuse what this machine cannot do, and keys that undo one another."""
    how = recipe.train
    if how.masters == "bf16" and kind_of(recipe) != "full":
        raise Refused(
            "train.masters bf16 is for layers trained whole (train.rank 0, network.kind full): "
            "factors are small, leave theirs in fp32."
        )
    if how.masters == "bf16" and how.ema:
        raise Refused("train.ema keeps fp32 copies of what train.masters bf16 halves: drop one.")
    if how.channels_last and torch.device(device).type == "cpu":
        # torch 2.13's group norm crashes there, going back over an input without gradients
        raise Refused("train.channels_last is a layout for GPUs: leave it out on a CPU.")
    if how.compile and (fault := uncompilable(device)):
        raise Refused(f"train.compile: torch.compile does not run on {device} ({fault}).")


def uncompilable(device: str) -> str:
    """Why torch.compile cannot run here, "" where it can."""
    probe = torch.ones(8, device=device)
    try:
        torch.compile(lambda x: x.sin() + 1, backend=BACKEND)(probe)
    except Exception as error:  # compilers fail in ways of their own
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return ""


def told(model: Model, recipe: Recipe) -> str:
    """One sentence on precision and attention."""
    how = recipe.train
    kinds = {type(layer).__name__ for layer in getattr(model.unet, "attn_processors", {}).values()}
    fast = kinds and all("2_0" in kind for kind in kinds)
    attention = "sdpa" if fast else ", ".join(sorted(kinds)) or "none"
    extras = [name for name in ("recompute", "compile", "channels_last") if getattr(how, name)]
    more = f"; {', '.join(extras)}" if extras else ""
    network = str(model.dtype).removeprefix("torch.")
    return (
        f"The network computes in {network}, {how.masters} is trained, attention is "
        f"{attention}{more}."
    )
