"""An attached adapter: the teacher is the original, the trunk costs nothing, detach undoes it."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from recast.adapter import Adapter, Attached, attach, patch_from
from recast.adapter.layers import Dropouts
from recast.errors import Refused
from recast.lowrank import Full, LowRank, factorize


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


class Net(nn.Module):
    """A linear, a 3x3 and a strided convolution and a norm, as a UNet has them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.down = nn.Conv2d(8, 6, 3, stride=2, padding=1)
        self.out = nn.Linear(6, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(torch.relu(self.norm(self.conv(x))))
        return self.out(x.flatten(2).transpose(1, 2))


def site(module: str, param: str = "weight", part: str = "unet") -> SimpleNamespace:
    return SimpleNamespace(
        part=part, module=module, param=param, lora=f"lora_unet_{module.replace('.', '_')}"
    )


SITES = [
    site("conv"),
    site("norm"),
    site("norm", "bias"),
    site("down"),
    site("down", "bias"),
    site("out"),
]


def answer(net: nn.Module, x: Tensor) -> Tensor:
    """The output without a graph, which may change how torch sums."""
    with torch.no_grad():
        return net(x)


@pytest.fixture
def net() -> Net:
    """Frozen as attach leaves it: torch folds a matmul differently where gradients are wanted."""
    torch.manual_seed(0)
    net = Net().eval().requires_grad_(False)
    net.conv.bias.requires_grad_()
    return net


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))


def principal(net: nn.Module, rank: int = 2) -> Adapter:
    """Low-rank for matrices and convolutions, full for norms and biases."""
    entries: dict[str, LowRank | Full] = {}
    for at in SITES:
        value = getattr(net.get_submodule(at.module), at.param).float()
        low = value.ndim > 1
        name = f"{at.lora}.{at.param}"
        entries[name] = factorize(value, rank) if low else Full(torch.zeros_like(value))
    return Adapter(entries, {"recast.role": "pissa-init", "recast.energy": "0.5"})


def full(net: nn.Module) -> Adapter:
    entries = principal(net).entries
    return Adapter(
        {k: Full(torch.zeros(e.shape)) for k, e in entries.items()}, {"recast.role": "full"}
    )


@pytest.fixture(params=[principal, full])
def adapter(request: pytest.FixtureRequest, net: Net) -> Adapter:
    return request.param(net)


def stir(attached: Attached, size: float = 0.05) -> None:
    made = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in attached.parameters():
            parameter += size * torch.randn(parameter.shape, generator=made)


def test_untrained_student_and_teacher_are_the_original(
    net: Net, x: Tensor, adapter: Adapter
) -> None:
    before = answer(net, x)
    attached = attach({"unet": net}, adapter, SITES)
    assert torch.equal(answer(net, x), before)
    stir(attached)
    assert not torch.allclose(answer(net, x), before)
    with attached.teacher():
        assert torch.equal(answer(net, x), before)
        assert not net(x).requires_grad
        with attached.teacher():
            assert torch.equal(answer(net, x), before)
        assert torch.equal(answer(net, x), before)
    assert not torch.equal(answer(net, x), before)


def test_student_is_the_network_with_changed_weights(net: Net, x: Tensor, adapter: Adapter) -> None:
    attached = attach({"unet": net}, adapter, SITES)
    stir(attached)
    student = net(x)
    trained = attached.trained()
    attached.detach()
    with torch.no_grad():
        for at in SITES:
            name = f"{at.lora}.{at.param}"
            delta = trained.entries[name].dense() - adapter.entries[name].dense()
            getattr(net.get_submodule(at.module), at.param).add_(delta)
    torch.testing.assert_close(net(x), student, atol=1e-5, rtol=1e-5)


def test_a_trained_adapter_and_a_patch_answer_alike(net: Net, x: Tensor) -> None:
    start = principal(net)
    before = answer(net, x)
    attached = attach({"unet": net}, start, SITES)
    stir(attached)
    student, trained = answer(net, x), attached.trained()
    attached.detach()
    with pytest.raises(Refused, match="--initial"):
        attach({"unet": net}, trained, SITES)
    for given, initial in ((trained, start), (patch_from(start, trained), None)):
        attached = attach({"unet": net}, given, SITES, initial=initial)
        torch.testing.assert_close(answer(net, x), student, atol=1e-5, rtol=1e-5)
        assert attached.trained().role == given.role
        with attached.teacher():
            assert torch.equal(answer(net, x), before)
        attached.detach()
    assert torch.equal(answer(net, x), before)


def test_low_rank_gradients_are_those_of_the_product(net: Net, x: Tensor) -> None:
    start = principal(net)
    attached = attach({"unet": net}, start, SITES)
    stir(attached)
    net(x).square().sum().backward()
    named = attached.named()
    up, down = (named[f"lora_unet_out.lora_{side}.weight"] for side in ("up", "down"))
    b, a = up.detach().clone().requires_grad_(), down.detach().clone().requires_grad_()
    layer = net.out
    inner = x
    with torch.no_grad():
        inner = net.down(torch.relu(net.norm(net.conv(x)))).flatten(2).transpose(1, 2)
    residual = layer.base.weight - layer.up0 @ layer.down0
    (inner @ (residual + b @ a).T).square().sum().backward()
    torch.testing.assert_close(up.grad, b.grad, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(down.grad, a.grad, atol=1e-3, rtol=1e-4)


def test_detach_gives_back_the_same_objects(net: Net, x: Tensor, adapter: Adapter) -> None:
    before = answer(net, x)
    modules = {n: (m, type(m)) for n, m in net.named_modules()}
    values = {n: (p, p.detach().clone(), p.requires_grad) for n, p in net.named_parameters()}
    attached = attach({"unet": net}, adapter, SITES)
    stir(attached)
    attached.detach()
    assert {n: (m, type(m)) for n, m in net.named_modules()} == modules
    assert {n for n, _ in net.named_parameters()} == set(values)
    for name, parameter in net.named_parameters():
        same, value, wanted = values[name]
        assert parameter is same
        assert parameter.requires_grad == wanted
        assert torch.equal(parameter, value)
    assert torch.equal(answer(net, x), before)


def test_only_masters_are_trained_and_their_order_is_that_of_the_sites(
    net: Net, adapter: Adapter
) -> None:
    attached = attach({"unet": net}, adapter, SITES)
    learning = {id(p) for p in net.parameters() if p.requires_grad}
    assert learning == {id(p) for p in attached.parameters()}
    shuffled = Adapter(dict(reversed(adapter.entries.items())), adapter.metadata)
    names = list(attached.named())
    attached.detach()
    assert list(attach({"unet": net}, shuffled, SITES).named()) == names
    assert names[-1].startswith("lora_unet_out.")


def test_trained_and_load_are_a_round_trip(net: Net, x: Tensor, adapter: Adapter) -> None:
    attached = attach({"unet": net}, adapter, SITES)
    stir(attached)
    wanted, trained = answer(net, x), attached.trained()
    assert trained.role in ("pissa-trained", "full")
    assert "recast.energy" not in trained.metadata
    stir(attached, 1.0)
    assert trained.entries.keys() == adapter.entries.keys()
    attached.load(trained)
    assert torch.equal(answer(net, x), wanted)


def test_bf16_trunk_with_fp32_masters_sees_small_steps(net: Net, x: Tensor) -> None:
    net.bfloat16()
    x = x.bfloat16()
    before = answer(net, x)
    attached = attach({"unet": net}, principal(net), SITES)
    assert {p.dtype for p in attached.parameters()} == {torch.float32}
    assert net(x).dtype == torch.bfloat16
    assert torch.equal(answer(net, x), before)
    layer = net.out
    inner = torch.randn(64, 6).bfloat16()
    with torch.no_grad():
        layer.up += 1e-4 * torch.randn(layer.up.shape, generator=torch.Generator().manual_seed(3))
    delta = (layer.up - layer.up0) @ layer.down
    seen = layer(inner).float() - layer.base(inner).float()
    layer.base.weight.data.zero_()
    alone = layer(inner).float()
    exact = inner.float() @ delta.T
    assert (alone - exact).norm() < 0.02 * exact.norm()
    assert seen.shape == exact.shape
    net(x).float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in attached.parameters())


def test_dropout_touches_only_the_change(net: Net, x: Tensor) -> None:
    before = answer(net, x)
    attached = attach({"unet": net}, principal(net), SITES, dropouts=Dropouts(0.5))
    net.train()
    assert torch.equal(answer(net, x), before)
    stir(attached)
    assert not torch.equal(net(x), net(x))
    with torch.no_grad():
        assert torch.equal(net(x), net(x))
    with attached.teacher():
        assert torch.equal(answer(net, x), before)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda e: {**e, "lora_unet_nowhere.weight": e["lora_unet_out.weight"]}, "nowhere"),
        (lambda e: {**e, "lora_unet_out.weight": e["lora_unet_conv.weight"]}, "shape"),
        (lambda e: {"lora_unet_norm.weight": factorize(torch.ones(8, 1), 1)}, "shape|linear"),
    ],
)
def test_an_adapter_of_another_model_is_refused(net: Net, change, words: str) -> None:
    start = principal(net)
    wanted = {n: p.requires_grad for n, p in net.named_parameters()}
    with pytest.raises(Refused, match=words):
        attach({"unet": net}, Adapter(change(start.entries), start.metadata), SITES)
    assert {n: p.requires_grad for n, p in net.named_parameters()} == wanted


def test_load_refuses_other_names_kinds_and_ranks(net: Net) -> None:
    start = principal(net)
    attached = attach({"unet": net}, start, SITES)
    with pytest.raises(Refused, match="only one"):
        attached.load(Adapter({}, {}))
    with pytest.raises(Refused, match="full in the other"):
        attached.load(Adapter({k: Full(torch.zeros(e.shape)) for k, e in start.entries.items()}))
    with pytest.raises(Refused, match="has shape"):
        attached.load(principal(Net(), rank=3))


def test_attaching_twice_is_refused(net: Net) -> None:
    start = principal(net)
    attach({"unet": net}, start, SITES)
    with pytest.raises(Refused, match="already"):
        attach({"unet": net}, start, SITES)


def tiny_unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=8,
    ).eval()


def inside(net: nn.Module, trunk: list[str]) -> Iterator[tuple[str, nn.Module]]:
    return ((n, m) for n, m in net.named_modules() if n and any(n.startswith(t) for t in trunk))


def test_a_frozen_trunk_keeps_no_activations() -> None:
    """Measured once, SDXL UNet of widths 64, 128, 128, 4 latents of 16x16, one thread: training
    everything kept 54.0 MB and took 0.30 s a step, the read-out 10.3 MB and 0.13 s, of which the
    forward pass alone takes 0.10 s.
    """
    unet = tiny_unet()
    readout = ("up_blocks.1", "conv_norm_out", "conv_out")
    sites = [
        site(m, p.rpartition(".")[2])
        for p, _ in unet.named_parameters()
        if p.startswith(readout) and (m := p.rpartition(".")[0])
    ]
    zeros = {
        f"{s.lora}.{s.param}": Full(torch.zeros_like(unet.get_parameter(f"{s.module}.{s.param}")))
        for s in sites
    }
    depth, kept = 0, {"trunk": 0, "readout": 0}

    def enter(*_: object) -> None:
        nonlocal depth
        depth += 1

    def leave(*_: object) -> None:
        nonlocal depth
        depth -= 1

    trunk = ["conv_in", "time_", "down_blocks", "mid_block", "up_blocks.0"]
    for _, module in inside(unet, trunk):
        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)

    def pack(tensor: Tensor) -> Tensor:
        kept["trunk" if depth else "readout"] += 1
        return tensor

    def step() -> Tensor:
        inputs = torch.randn(1, 4, 8, 8), torch.tensor(300.5), torch.randn(1, 3, 8)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            return unet(*inputs).sample

    step()
    assert kept["trunk"] > 50
    kept.update(trunk=0, readout=0)
    attached = attach({"unet": unet}, Adapter(zeros, {"recast.role": "full"}), sites)
    step().sum().backward()
    assert kept["trunk"] == 0
    assert kept["readout"] > 0
    assert all(p.grad is not None for p in attached.parameters())
    with attached.teacher():
        kept.update(trunk=0, readout=0)
        step()
    assert kept == {"trunk": 0, "readout": 0}
