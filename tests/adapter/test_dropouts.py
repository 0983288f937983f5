"""Dropouts leave out parts of what was learned, T - T0, and nothing of the principal weights."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from recast.adapter import Adapter, Attached, attach
from recast.adapter.layers import Dropouts
from recast.lowrank import LowRank, factorize

RANK = 3
ALL = Dropouts(0.5, 0.5, 0.5)
LAYERS = {
    "linear": lambda: nn.Linear(7, 6),
    "vector": lambda: nn.Linear(7, 6),
    "conv": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1),
}
INPUTS = {"linear": (5, 4, 7), "vector": (5, 7), "conv": (5, 4, 6, 6)}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def site() -> SimpleNamespace:
    return SimpleNamespace(part="unet", module="layer", param="weight", lora="lora_unet_layer")


def put(kind: str, role: str, dropouts: Dropouts, *, stirred: bool) -> tuple[nn.Module, Attached]:
    """A layer with principal factors or a LoRA, trained or not, and the attachment."""
    net = nn.ModuleDict({"layer": LAYERS[kind]()}).requires_grad_(False)
    weight = net["layer"].weight
    entry = factorize(weight, RANK)
    if role == "delta":
        entry = LowRank(torch.zeros_like(entry.up), entry.down)
    adapter = Adapter({"lora_unet_layer.weight": entry}, {"recast.role": role})
    scales = {"lora_unet_layer.weight": 0.5} if role == "delta" else None
    attached = attach({"unet": net}, adapter, [site()], dropouts=dropouts, scales=scales)
    with torch.no_grad():
        for master in attached.parameters() if stirred else ():
            master += 0.3 * torch.randn_like(master)
    return net.train()["layer"], attached


def asked(kind: str) -> Tensor:
    return torch.randn(INPUTS[kind], generator=torch.Generator().manual_seed(1))


def answers(layer: nn.Module, x: Tensor, attached: Attached) -> tuple[Tensor, Tensor]:
    """(base, base and the whole change), without gradients and so without dropouts."""
    with torch.no_grad():
        whole = layer(x)
    with attached.teacher():
        return layer(x), whole


@pytest.mark.parametrize("role", ["pissa-init", "delta"])
@pytest.mark.parametrize("kind", list(LAYERS))
def test_nothing_of_an_untrained_layer_is_left_out(kind: str, role: str) -> None:
    """Its change is zero, so every draw answers as the original, principal weights and all."""
    layer, attached = put(kind, role, ALL, stirred=False)
    base, _ = answers(layer, asked(kind), attached)
    for _ in range(5):
        torch.testing.assert_close(layer(asked(kind)).detach(), base, atol=1e-6, rtol=0)


@pytest.mark.parametrize("role", ["pissa-init", "delta"])
@pytest.mark.parametrize("kind", list(LAYERS))
def test_ranks_go_sample_by_sample_as_a_whole(kind: str, role: str) -> None:
    """Each sample has directions of T - T0, scaled up, or lacks them: both halves of each."""
    layer, attached = put(kind, role, Dropouts(ranks=0.4), stirred=True)
    x = asked(kind)
    base, _ = answers(layer, x, attached)
    up, down = (factor.detach() for factor in layer.change())
    single = []
    for k in range(RANK):
        both = range(k, up.shape[1], RANK)
        delta = sum(torch.outer(up[:, i], down[i].flatten()) for i in both)
        weight = delta.reshape(layer.weight.shape)
        if kind == "conv":
            single.append(layer.base._conv_forward(x, weight, None))
        else:
            single.append(nn.functional.linear(x, weight))
    seen = set()
    for _ in range(8):
        moved = (layer(x).detach() - base).flatten(1)
        for b in range(len(x)):
            parts = torch.stack([part[b].flatten() for part in single], 1)
            found = torch.linalg.lstsq(parts, moved[b][:, None]).solution.flatten()
            rounded = (found * 0.6).round()
            torch.testing.assert_close(found, rounded / 0.6, atol=1e-3, rtol=0)
            assert set(rounded.tolist()) <= {0.0, 1.0}
            seen.add(tuple(rounded.tolist()))
    assert len(seen) > 3


@pytest.mark.parametrize("dropouts", [Dropouts(values=0.5), Dropouts(ranks=0.5)])
def test_the_mean_of_many_draws_is_the_whole_change(dropouts: Dropouts) -> None:
    layer, attached = put("linear", "pissa-init", dropouts, stirred=True)
    x = asked("linear")
    base, whole = answers(layer, x, attached)
    count = 3000
    mean = sum((layer(x).detach() - base for _ in range(count)), torch.zeros(())) / count
    assert (mean - (whole - base)).norm() < 0.08 * (whole - base).norm()


def test_a_module_is_left_out_for_a_step_and_not_scaled() -> None:
    layer, attached = put("conv", "delta", Dropouts(modules=0.3), stirred=True)
    x = asked("conv")
    base, whole = answers(layer, x, attached)
    out = 0
    for _ in range(400):
        found = layer(x)
        found.sum().backward()  # a step without any change still has gradients, of zero
        gone = torch.allclose(found, base, atol=1e-6)
        assert gone or torch.allclose(found, whole, atol=1e-5)
        out += gone
    assert 80 < out < 160


@pytest.mark.parametrize("role", ["pissa-init", "delta"])
def test_looking_is_exact(role: str) -> None:
    """In evaluation, and without gradients in training: previews and validation see all of it."""
    layer, attached = put("linear", role, ALL, stirred=True)
    x = asked("linear")
    _, whole = answers(layer, x, attached)
    layer.eval()
    torch.testing.assert_close(layer(x).detach(), whole, atol=1e-6, rtol=0)
    layer.train()
    assert not torch.allclose(layer(x).detach(), whole, atol=1e-3)
