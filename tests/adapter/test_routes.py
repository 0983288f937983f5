"""The shorter ways through diffusers' modules against the ways that their classes have."""

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from recast.adapter import Adapter, Attached, attach
from recast.adapter.layers import NONE, Dropouts
from recast.adapter.routes import Gated, lengthen, shorten, withheld
from recast.adapter.several import several
from recast.convert import running
from recast.lowrank import LowRank, factorize

ROLES = {"principal": "pissa-init", "zero": "delta"}


@pytest.fixture
def unet() -> UNet2DConditionModel:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    made = UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=2,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=12,
    )  # fmt: skip
    return made.eval().requires_grad_(False)


def put_in(
    unet: nn.Module, begins: str, rank: int = 2, dropouts: Dropouts = NONE, only: str = ""
) -> Attached:
    """Factors on every layer whose name has `only` in it; what they add is not nothing."""
    torch.manual_seed(1)
    sites, entries = [], {}
    for name, module in unet.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d) or only not in name:
            continue
        lora = "lora_unet_" + name.replace(".", "_")
        sites.append(SimpleNamespace(part="unet", module=name, param="weight", lora=lora))
        weight = module.weight.detach().float()
        out, into, *kernel = weight.shape
        drawn = LowRank(torch.zeros(out, rank), torch.randn(rank, into, *kernel) * 0.2)
        most = min(rank, out, weight[0].numel())
        principal = begins == "principal"
        entries[f"{lora}.weight"] = factorize(weight, most) if principal else drawn
    scales = None if begins == "principal" else dict.fromkeys(entries, 0.5)
    adapter = Adapter(entries, {"recast.role": ROLES[begins]})
    made = attach({"unet": unet}, adapter, sites, dropouts=dropouts, scales=scales)
    with torch.no_grad():
        for master in made.parameters():
            master += 0.05 * torch.randn(master.shape)
    return made


def step(unet: nn.Module, made: Attached, dtype: torch.dtype, side: int = 8) -> list[Tensor]:
    """The answer, the gradient of the text, and those of all masters."""
    source = torch.Generator().manual_seed(3)
    x = torch.randn(2, 4, side, side, generator=source).to(dtype)
    words = torch.randn(2, 5, 12, generator=source).to(dtype).requires_grad_()
    answer = unet(x, torch.tensor([3, 700]), words).sample
    for master in made.parameters():
        master.grad = None
    answer.float().square().mean().backward()
    return [answer.detach(), words.grad, *(master.grad for master in made.parameters())]


@pytest.mark.parametrize("begins", ["zero", "principal"])
@pytest.mark.parametrize("rank", [1, 6])
@pytest.mark.parametrize("side", [4, 16])
@pytest.mark.parametrize("again", [False, True])
def test_answer_and_gradients_are_those_of_the_long_way(
    unet: UNet2DConditionModel, begins: str, rank: int, side: int, again: bool
) -> None:
    made = put_in(unet, begins, rank)
    if again:
        unet.enable_gradient_checkpointing()
        unet.train()
    assert len(made.routes) == 8 + 4 + 8  # attentions, gates, resnets
    short = step(unet, made, torch.float32, side)
    lengthen(made.routes)
    long = step(unet, made, torch.float32, side)
    assert (short[0] - long[0]).norm() < 1e-5 * long[0].norm()
    longest = max(gradient.norm() for gradient in long[1:])
    for found, wanted in zip(short[1:], long[1:], strict=True):
        assert wanted.norm() > 0
        assert (found - wanted).norm() < min(1e-5 * longest, 1e-3 * wanted.norm())


def test_in_bf16_they_are_as_near_as_bf16_is(unet: UNet2DConditionModel) -> None:
    made = put_in(unet.bfloat16(), "principal")
    short = step(unet, made, torch.bfloat16)
    lengthen(made.routes)
    for found, wanted in zip(short, step(unet, made, torch.bfloat16), strict=True):
        assert found.dtype == wanted.dtype
        assert (found - wanted).float().norm() < 0.05 * wanted.float().norm() + 1e-5


def test_untrained_student_and_teacher_are_the_original_and_detach_undoes_it(
    unet: UNet2DConditionModel,
) -> None:
    def answer() -> Tensor:
        with torch.no_grad():
            return unet(torch.ones(2, 4, 8, 8), 5, torch.ones(2, 5, 12)).sample

    before, own = answer(), {name: vars(m).keys() for name, m in unet.named_modules()}
    made = put_in(unet, "principal")
    changed = answer()
    assert not torch.equal(changed, before)
    with made.teacher():
        assert torch.equal(answer(), before)
    made.restart()
    assert torch.equal(answer(), before)
    made.detach()
    assert torch.equal(answer(), before)
    assert {name: vars(m).keys() for name, m in unet.named_modules()} == own


def test_what_is_listened_to_goes_the_long_way(
    unet: UNet2DConditionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = put_in(unet, "zero")
    called: list[int] = []
    monkeypatch.setattr("recast.adapter.routes.several", lambda *a: called.append(1) or several(*a))
    attention = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    x = torch.randn(2, 4, 16)
    attention(x)
    assert len(called) == 2
    heard: list[Tensor] = []
    handle = attention.to_q.register_forward_hook(lambda module, args, out: heard.append(out))
    attention(x)
    handle.remove()
    assert len(heard) == 1
    base = attention.to_v.base.register_forward_hook(lambda module, args, out: heard.append(out))
    attention(x)
    base.remove()
    assert len(heard) == 2
    attention(x, attention_mask=torch.zeros(2, 1, 4))
    with torch.autocast("cpu", torch.bfloat16):
        attention(x)
    with made.teacher():
        attention(x)
    assert len(called) == 2
    attention(x)
    assert len(called) == 4


def test_they_can_be_withheld(unet: UNet2DConditionModel) -> None:
    made = put_in(unet, "zero")
    ways = [vars(module)["forward"] for module in made.routes]
    with withheld(made.routes):
        assert not any("forward" in vars(module) for module in unet.modules())
    assert [vars(module)["forward"] for module in made.routes] == ways


def test_a_compiler_is_shown_the_long_way(
    unet: UNet2DConditionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "BACKEND", "eager")
    made = put_in(unet, "zero")
    model = SimpleNamespace(unet=unet, text_parts=(), parts={})
    recipe = SimpleNamespace(
        train=SimpleNamespace(channels_last=False, recompute=False, compile=True)
    )
    with running.running(model, made, recipe):
        assert not any("forward" in vars(module) for module in unet.modules())
    assert all("forward" in vars(module) for module in made.routes)


def test_a_copy_goes_its_own_way(unet: UNet2DConditionModel) -> None:
    put_in(unet, "zero")
    copied = deepcopy(unet)
    for module in copied.modules():
        assert vars(module).get("forward", module.forward).__self__ is module


def test_what_drops_out_does_so_still(unet: UNet2DConditionModel) -> None:
    put_in(unet, "zero", dropouts=Dropouts(0.5))
    unet.train()
    attention = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    x = torch.randn(2, 4, 16)
    assert not torch.equal(attention(x), attention(x))
    with torch.no_grad():
        assert torch.equal(attention(x), attention(x))


def test_dropouts_of_nothing_are_no_reason_for_the_long_way(unet: UNet2DConditionModel) -> None:
    made = put_in(unet, "zero", dropouts=Dropouts(0.0))
    unet.train()
    assert all(spot.layer.dropouts is NONE for spot in made.spots)


def test_only_attentions_whose_layers_all_have_factors_are_shortened(
    unet: UNet2DConditionModel,
) -> None:
    made = put_in(unet, "zero", only="to_q")
    assert {type(m).__name__ for m in made.routes} == {"GEGLU", "ResnetBlock2D"}
    assert shorten(unet) == []
    unet.set_default_attn_processor()
    step(unet, made, torch.float32)


def test_a_gate_is_the_product_and_refuses_nothing_of_its_gradient() -> None:
    torch.manual_seed(0)
    both = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(Gated.apply, both)
    y, g = both.chunk(2, -1)
    assert torch.equal(Gated.apply(both), y * nn.functional.gelu(g))
