"""The fused step against torch's own autograd on the formula it stands for."""

import pytest
import torch
from torch import Tensor, nn

from recast.adapter.fused import fusable, fused, narrow
from recast.adapter.layers import LoCon, Switch
from recast.lowrank import LowRank

LAYERS = {
    "linear": (lambda: nn.Linear(12, 10), (3, 7, 12)),
    "no bias": (lambda: nn.Linear(12, 10, bias=False), (5, 12)),
    "conv": (lambda: nn.Conv2d(6, 10, 3, padding=1), (2, 6, 5, 7)),
    "strided": (lambda: nn.Conv2d(6, 10, 3, stride=2, padding=1), (2, 6, 8, 6)),
    "one pixel": (lambda: nn.Conv2d(12, 10, 1), (2, 12, 4, 4)),
}
WAYS = {"chain": (torch.float64, 6), "summed": (torch.float32, 1), "whole": (torch.float32, 6)}


def factors(layer: nn.Module, rank: int = 4) -> tuple[nn.Parameter, nn.Parameter]:
    out, into, *kernel = layer.weight.shape
    up, down = torch.randn(out, rank), torch.randn(rank, into, *kernel)
    return nn.Parameter(up * 0.3), nn.Parameter(down * 0.3)


def slow(layer: nn.Module, x: Tensor, up: Tensor, down: Tensor, start, scale: float) -> Tensor:
    """The layer with the summed weight."""
    change = up @ down.flatten(1) * scale
    if start:
        change = change - start[0] @ start[1].flatten(1)
    weight = layer.weight + change.view_as(layer.weight)
    if isinstance(layer, nn.Conv2d):
        return layer._conv_forward(x, weight, layer.bias)
    return nn.functional.linear(x, weight, layer.bias)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("begins", ["zero", "principal"])
@pytest.mark.parametrize("way", WAYS)
def test_answer_and_gradients_are_those_of_the_summed_weight(
    kind: str, begins: str, way: str
) -> None:
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    dtype, rank = WAYS[way]
    layer = make().to(dtype).requires_grad_(False)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    up, down = (nn.Parameter(f.detach().to(dtype)) for f in factors(layer, rank))
    start, scale = None, 0.5
    if begins == "principal":
        start, scale = tuple(f.detach().to(dtype) for f in factors(layer, rank)), 1.0
    assert fusable(layer, x)
    assert narrow(layer.weight, rank) == (rank == 6)
    wanted = slow(layer, x, up, down, start, scale)
    pull = torch.randn_like(wanted)
    exact = torch.autograd.grad(wanted, [x, up, down], pull)
    made = fused(layer, x, up, down, start, scale)
    torch.testing.assert_close(made, wanted, atol=1e-5, rtol=1e-5)
    for found, right in zip(torch.autograd.grad(made, [x, up, down], pull), exact, strict=True):
        torch.testing.assert_close(found, right, atol=1e-4, rtol=1e-4)
    first = fused(layer, x.detach(), up, down, start, scale)
    for found, right in zip(torch.autograd.grad(first, [up, down], pull), exact[1:], strict=True):
        torch.testing.assert_close(found, right, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", LAYERS)
def test_it_keeps_no_more_than_the_input_and_its_projection(kind: str) -> None:
    make, shape = LAYERS[kind]
    layer = make().requires_grad_(False)
    up, down = factors(layer)
    kept: list[Tensor] = []
    x = torch.randn(shape)
    start = (up.detach().clone(), down.detach().clone())
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = fused(layer, x, up, down, start, 1.0)
    known = {id(t) for t in (layer.weight, up, down, *start)}
    sizes = sorted(t.numel() for t in kept if id(t) not in known and t.data_ptr() != x.data_ptr())
    assert sizes in ([], [4 * out.numel() // 10])
    assert out.grad_fn is not None


def test_a_layer_that_is_listened_to_or_padded_otherwise_takes_the_long_way() -> None:
    layer = nn.Linear(4, 4)
    assert fusable(layer, torch.ones(1, 4))
    assert not fusable(layer, torch.ones(1, 4).bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert not fusable(layer, torch.ones(1, 4))
    layer.register_forward_hook(lambda *_: None)
    assert not fusable(layer, torch.ones(1, 4))
    assert not fusable(nn.Conv2d(4, 4, 3, padding_mode="reflect"), torch.ones(1, 4, 4, 4))


def test_channels_last_and_bf16_follow_the_long_way() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 10, 3, padding=1).requires_grad_(False).bfloat16()
    up, down = factors(layer)
    around = LoCon(layer, LowRank(up, down), None, Switch())
    x = torch.randn(2, 6, 8, 8).bfloat16().to(memory_format=torch.channels_last)
    fast = around(x)
    layer.register_forward_hook(lambda *_: None)
    slow = around(x)
    assert fast.dtype == slow.dtype == torch.bfloat16
    assert (fast - slow).float().norm() < 0.01 * slow.float().norm()
