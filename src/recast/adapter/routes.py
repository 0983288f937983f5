"""Shorter ways through diffusers' attention, gated units and resnets while an adapter is attached.

The same sums in the same order, up to rounding where factors are: queries, keys and values that
read one input are one step of autograd (see several), so is a gate; nothing is divided by 1. A
module that is listened to, shows the teacher, drops something out, is compiled, or is set up in a
way not seen to here goes the way its class has it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recast.adapter.fused import fusable, once, run
from recast.adapter.layers import NONE, LoCon
from recast.adapter.several import several

WHERE = "diffusers.models."


def shorten(network: nn.Module) -> list[nn.Module]:
    """Send the modules that can take a shorter way along it; returns them, for `lengthen`."""
    found = []
    for kind, way, fits in _ways():
        for module in network.modules():
            if type(module) is kind and "forward" not in vars(module) and fits(module):
                module.forward = MethodType(way, module)
                found.append(module)
    return found


def lengthen(modules: list[nn.Module]) -> None:
    """Give modules their own way back."""
    for module in modules:
        vars(module).pop("forward", None)


@contextmanager
def withheld(modules: list[nn.Module]) -> Iterator[None]:
    """Inside, modules go their own way."""
    kept = [(module, vars(module).pop("forward", None)) for module in modules]
    try:
        yield
    finally:
        for module, way in kept:
            if way is not None:
                module.forward = way


def _ways() -> Iterator[tuple[type, Any, Any]]:
    """(class, way, whether a module of it may take it); none where diffusers is not loaded."""
    for place, name, way, fits in (
        ("attention_processor", "Attention", attention, _plain_attention),
        ("activations", "GEGLU", gated_unit, lambda module: True),
        ("resnet", "ResnetBlock2D", resnet, _plain_resnet),
    ):
        if loaded := sys.modules.get(WHERE + place):
            yield getattr(loaded, name), way, fits


def attention(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    **more: Any,
) -> Tensor:
    """diffusers' `Attention.forward`."""
    source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
    query, key, value, last = self.to_q, self.to_k, self.to_v, self.to_out[0]
    if (
        more or attention_mask is not None or hidden_states.ndim != 3
        or type(self.processor).__name__ != "AttnProcessor2_0" or torch.compiler.is_compiling()
        or not all(_ready(layer, hidden_states) for layer in (query, key, value, last))
    ):  # fmt: skip
        return type(self).forward(
            self, hidden_states, encoder_hidden_states, attention_mask, **more
        )
    if source is hidden_states:
        q, k, v = several(source, (query, key, value), self.heads)
    else:
        q = several(hidden_states, (query,), self.heads)
        k, v = several(source, (key, value), self.heads)
    return several(F.scaled_dot_product_attention(q, k, v), (last,))


def _plain_attention(module: Any) -> bool:
    """Whether an attention is no more than its four layers, all with factors that begin alike."""
    layers = (module.to_q, module.to_k, module.to_v, module.to_out[0])
    extras = ("group_norm", "spatial_norm", "norm_q", "norm_k", "norm_cross", "residual_connection")
    return (
        not any(getattr(module, name, None) for name in extras)
        and module.rescale_output_factor == 1
        and getattr(module, "add_k_proj", None) is None
        and not module.to_out[1].p
        and all(isinstance(x, LoCon) and type(x.base) is nn.Linear for x in layers)
        and len({x.up0 is None for x in layers}) == 1
        and module.to_q.base.weight.shape[0] == module.to_k.base.weight.shape[0]
        and module.to_k.base.weight.shape == module.to_v.base.weight.shape
    )


def _ready(layer: LoCon, x: Tensor) -> bool:
    """Whether a layer would take its fused way for this input, and nothing listens to it."""
    drops = layer.dropouts is not NONE and layer.training and torch.is_grad_enabled()
    listened = layer._forward_hooks or layer._forward_pre_hooks
    return layer.switch.student and not drops and not listened and fusable(layer.base, x)


def gated_unit(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """diffusers' `GEGLU.forward`."""
    if args or kwargs or hidden_states.device.type == "npu" or torch.compiler.is_compiling():
        return type(self).forward(self, hidden_states, *args, **kwargs)
    return run(Gated, self.proj(hidden_states))


class Gated(torch.autograd.Function):
    """y gelu(g) of (y, g) side by side; their gradients are made side by side, too."""

    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        y, g = both.chunk(2, -1)
        gate = F.gelu(g)
        ctx.save_for_backward(both, gate)
        return y * gate

    @staticmethod
    @once
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        both, gate = ctx.saved_tensors
        (y, g), found = both.chunk(2, -1), torch.empty_like(both)
        first, second = found.chunk(2, -1)
        torch.mul(dy, gate, out=first)
        torch.mul(dy, y, out=second)
        torch.ops.aten.gelu_backward.grad_input(second, g, grad_input=second)
        return found


def resnet(self: Any, input_tensor: Tensor, temb: Tensor | None, *args: Any, **more: Any) -> Tensor:
    """diffusers' `ResnetBlock2D.forward`."""
    if args or more or torch.compiler.is_compiling():
        return type(self).forward(self, input_tensor, temb, *args, **more)
    hidden = self.conv1(F.silu(self.norm1(input_tensor)))
    if self.time_emb_proj is not None:
        assert temb is not None
        hidden = hidden + self.time_emb_proj(F.silu(temb))[:, :, None, None]
    hidden = self.conv2(F.silu(self.norm2(hidden)))
    if self.conv_shortcut is not None:
        input_tensor = self.conv_shortcut(input_tensor)
    return input_tensor + hidden


def _plain_resnet(module: Any) -> bool:
    """Whether a resnet is two convolutions with a clock between them, and no more."""
    return (
        module.upsample is None and module.downsample is None and not module.skip_time_act
        and module.time_embedding_norm == "default" and module.output_scale_factor == 1
        and type(module.nonlinearity) is nn.SiLU and not module.dropout.p
    )  # fmt: skip
