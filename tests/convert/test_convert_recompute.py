"""Recomputing text encoders for the backward pass: less is kept, and the gradients are the same."""

from __future__ import annotations

import torch
from tests.text.test_encode import PADS, PROMPTS, encode_prompts, encoder
from torch import Tensor, nn

from recast.convert.running import forgo, recompute


def learn(pair: list[nn.Module]) -> tuple[int, list[Tensor | None]]:
    """(numbers kept for the backward pass, the gradient of every parameter)."""
    kept = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    parameters = [p for each in pair for p in each.parameters()]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        context, pooled = encode_prompts(pair, PROMPTS, pads=PADS, penultimate=True)
    assert pooled is not None
    loss = context.square().mean() + pooled.square().mean()
    return kept, list(torch.autograd.grad(loss, parameters, allow_unused=True))


def test_text_encoders_learn_the_same_when_recomputed() -> None:
    pair = [encoder(16, 4, None, 0), encoder(24, 4, 20, 1)]
    for each in pair:
        each.requires_grad_(True)
    much, plain = learn(pair)
    for each in pair:
        recompute(each)
    little, again = learn(pair)
    for each in pair:
        forgo(each)
        assert not each.training
    assert little < 0.6 * much
    assert learn(pair)[0] == much
    assert sum(gradient is not None for gradient in plain) > 0.7 * len(plain)
    for one, other in zip(plain, again, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)
