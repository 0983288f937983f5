"""A plain LoRA: it starts and moves as LyCORIS' does, and others' loaders answer as we do."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tests import tiny
from tests.adapter.loaders import answer, by_diffusers, by_lycoris, by_peft, network
from torch import nn

from recast.adapter import Adapter, attach, export, read_adapter
from recast.adapter.layers import Dropouts
from recast.adapter.lora import Dims, from_zero, write_lora
from recast.checkpoint import Checkpoint
from recast.errors import CheckFailed
from recast.layout import Layout, Site, detect
from recast.lowrank import LowRank

FAST = Dims(8, 4.0, 48, 4.0)  # the fast recipe's form: one alpha, convolutions of a high rank
ODD = Dims(6, 3.0, 4, 1.5)
SHAPES = {"linear": (6, 10), "conv": (6, 5, 3, 3), "one": (6, 5, 1, 1)}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module", params=["sdxl", "sd15"])
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator:
    path = tmp_path_factory.mktemp("lora") / "o.safetensors"
    with Checkpoint(tiny.checkpoint(path, request.param)) as file:
        yield file


def seeds(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(sum(name.encode()))


def grown(adapter: Adapter) -> Adapter:
    """With an `up` as after training, so that the change is a tenth of a usual weight."""
    entries = {}
    for name, entry in adapter.entries.items():
        up = 0.2 * torch.randn(entry.up.shape, generator=seeds(name + "up"))
        entries[name] = LowRank(up, entry.down)
    return Adapter(entries, adapter.metadata)


def all_sites(layout: Layout) -> list[Site]:
    return layout.sites(",".join(["lycoris-full", "te"]))


def test_it_starts_with_nothing_within_kaimings_bound(checkpoint: Checkpoint) -> None:
    sites = all_sites(detect(checkpoint))
    found = from_zero(checkpoint, sites, FAST, seeds)
    assert len(found.entries) == len(sites)
    assert found.role == "delta"
    assert found.base == checkpoint.sha256()
    for site in sites:
        entry = found.entries[f"{site.lora}.weight"]
        spatial = len(site.shape) == 4 and site.shape[2] > 1
        # the rank of a convolution is not bounded by its size, as LyCORIS' is not
        assert entry.rank == (48 if spatial else 8)
        assert not entry.up.any()
        like = torch.empty(entry.down.shape)
        nn.init.kaiming_uniform_(like, a=math.sqrt(5))
        bound = math.prod(site.shape[1:]) ** -0.5
        assert 0.9 * bound < float(entry.down.abs().max()) <= bound
        assert float(entry.down.std()) == pytest.approx(float(like.std()), rel=0.2)
    again = from_zero(checkpoint, sites[3:], FAST, seeds)
    name = f"{sites[5].lora}.weight"
    assert torch.equal(again.entries[name].down, found.entries[name].down)


def layer_of(kind: str) -> nn.Module:
    torch.manual_seed(3)
    if kind == "linear":
        return nn.Linear(10, 6)
    return nn.Conv2d(5, 6, SHAPES[kind][2], stride=2, padding=SHAPES[kind][2] // 2)


def input_of(kind: str) -> torch.Tensor:
    made = torch.Generator().manual_seed(7)
    return torch.randn((3, 4, 10) if kind == "linear" else (3, 5, 6, 6), generator=made)


@pytest.mark.parametrize("kind", list(SHAPES))
def test_it_moves_as_the_one_of_lycoris_does(kind: str) -> None:
    """The same start, 20 steps of Adam: alpha / dim has the same say in what is learned."""
    from lycoris.modules.locon import LoConModule

    dim, alpha = (7, 2.0) if kind == "conv" else (3, 6.0)
    x, base = input_of(kind), layer_of(kind)
    down = 0.3 * torch.randn(dim, *SHAPES[kind][1:], generator=seeds(kind))
    entry = LowRank(torch.zeros(6, dim), down)
    holder, site = nn.ModuleDict({"layer": layer_of(kind)}), place()
    attached = attach(
        {"unet": holder}, Adapter({"lora_unet_layer.weight": entry}), [site],
        scales={"lora_unet_layer.weight": alpha / dim},
    )  # fmt: skip
    theirs = LoConModule("x", base, 1.0, dim, alpha)
    theirs.lora_down.weight.data.copy_(down)
    theirs.apply_to()
    wanted = torch.randn(base(x).shape, generator=seeds("wanted"))
    runs = [(holder["layer"], attached.parameters()), (base, list(theirs.parameters()))]
    for net, masters in runs:
        optimizer = torch.optim.Adam(masters, 1e-2)
        for _ in range(20):
            optimizer.zero_grad()
            (net(x) - wanted).square().mean().backward()
            optimizer.step()
    trained = attached.trained().entries["lora_unet_layer.weight"]
    torch.testing.assert_close(holder["layer"](x), base(x), atol=1e-5, rtol=1e-5)
    delta = theirs.get_diff_weight()[0].detach()
    torch.testing.assert_close(trained.dense(), delta.reshape(trained.shape), atol=1e-6, rtol=1e-4)
    assert delta.norm() > 0.1


def place(module: str = "layer") -> SimpleNamespace:
    return SimpleNamespace(part="unet", module=module, param="weight", lora=f"lora_unet_{module}")


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_every_loader_answers_as_we_do(checkpoint: Checkpoint, tmp_path: Path) -> None:
    layout = detect(checkpoint)
    sites, dims = all_sites(layout), {"sdxl": FAST, "sd15": ODD}[layout.family]
    file = tmp_path / "l.safetensors"
    # fp32, for diffusers' own format has no alpha, and the scale in fp16 factors rounds them
    write_lora(file, grown(from_zero(checkpoint, sites, dims, seeds)), dims, dtype="F32")
    export(file, tmp_path / "peft", "peft", layout=layout)
    export(file, tmp_path / "d.safetensors", "diffusers", layout=layout)
    ours = read_adapter(file)
    for part in ("unet", *layout.text_parts):
        mine = [site for site in sites if site.part == part]
        net = network(checkpoint, part)
        before = answer(net, layout, part)
        entries = {f"{s.lora}.weight": ours.entries[f"{s.lora}.weight"] for s in mine}
        attach({part: net}, Adapter(entries), mine)
        wanted = answer(net, layout, part)
        assert (wanted - before).norm() > 0.02 * before.norm()
        for tool in ("lycoris", "peft", "kohya", "diffusers"):
            net = network(checkpoint, part)
            if tool == "lycoris":
                count = by_lycoris(net, file, part, sites)
            elif tool == "peft":
                net, count = by_peft(net, tmp_path / "peft", part)
            else:
                which = file if tool == "kohya" else tmp_path / "d.safetensors"
                count = by_diffusers(net, which, part, layout.family)
            assert count == len(mine)
            off = (answer(net, layout, part) - wanted).norm() / wanted.norm()
            assert off < 1e-5, (tool, part, float(off))


def test_the_file_is_kohyas(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Factors as they are trained, one alpha, LyCORIS' arguments."""
    sites = all_sites(detect(checkpoint))
    start = from_zero(checkpoint, sites, FAST, seeds)
    raw = grown(start)
    folded = {
        f"{s.lora}.weight": LowRank(e.up * FAST.scale(s), e.down)
        for s in sites
        for e in [raw.entries[f"{s.lora}.weight"]]
    }
    file = tmp_path / "l.safetensors"
    about = {"ss_learning_rate": "0.0003"}
    drops = Dropouts(0.1)
    write_lora(
        file, Adapter(folded, raw.metadata), FAST, dtype="F32", metadata=about, dropouts=drops
    )
    tensors = load_file(file)
    assert {float(t) for k, t in tensors.items() if k.endswith(".alpha")} == {4.0}
    assert len(tensors) == 3 * len(sites)
    for name, entry in raw.entries.items():
        up = tensors[name.replace(".weight", ".lora_up.weight")].flatten(1)
        torch.testing.assert_close(up, entry.up, rtol=1e-6, atol=0)
    with Checkpoint(file) as written:
        told = written.metadata
    assert (told["ss_network_module"], told["ss_network_dim"], told["ss_network_alpha"]) == (
        "lycoris.kohya", "8", "4.0",
    )  # fmt: skip
    assert json.loads(told["ss_network_args"]) == {
        "algo": "locon", "preset": "full", "conv_dim": "48", "conv_alpha": "4.0",
        "use_tucker": "False", "dropout": "0.1", "rank_dropout": "0.0", "module_dropout": "0.0",
    }  # fmt: skip
    assert told["ss_learning_rate"] == "0.0003"
    assert told["recast.base_sha256"] == checkpoint.sha256()
    write_lora(tmp_path / "16.safetensors", Adapter(folded, raw.metadata), FAST)
    half = load_file(tmp_path / "16.safetensors")
    assert {t.dtype for k, t in half.items() if not k.endswith(".alpha")} == {torch.float16}


def test_factors_that_a_precision_has_no_room_for_are_not_written(tmp_path: Path) -> None:
    entry = LowRank(torch.full((3, 8), 3e4), torch.ones(8, 3))  # in the file times 8 / 3
    adapter = Adapter({"lora_unet_x.weight": entry}, {"recast.role": "delta"})
    with pytest.raises(CheckFailed, match=r"lora_unet_x\.weight .* 8e\+04.* fp32"):
        write_lora(tmp_path / "l.safetensors", adapter, Dims(8, 3.0, 8, 3.0))
    assert not list(tmp_path.iterdir())
    write_lora(tmp_path / "l.safetensors", adapter, Dims(8, 3.0, 8, 3.0), dtype="BF16")
