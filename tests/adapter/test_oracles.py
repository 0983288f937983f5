"""Other people's code reads our adapter file and gets the same weights and the same outputs."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests import tiny
from torch import Tensor, nn

from recast.adapter import Adapter, attach, patch_from, write_adapter, zeros_full
from recast.adapter.decompose import decompose
from recast.checkpoint import Checkpoint
from recast.layout import Layout, Site, detect, from_file, keymap
from recast.lowrank import Full, LowRank


@pytest.fixture(scope="module", params=["sdxl", "sd15"])
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("tiny")
    with Checkpoint(tiny.checkpoint(folder / "o.safetensors", request.param)) as checkpoint:
        yield checkpoint


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def moved(tensor: Tensor, seed: int) -> Tensor:
    return tensor + 0.03 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed))


def low_rank_delta(checkpoint: Checkpoint, sites: list[Site]) -> Adapter:
    start = decompose(checkpoint, sites, 3)
    entries: dict[str, LowRank | Full] = {
        name: LowRank(moved(e.up, i), moved(e.down, -i))
        for i, (name, e) in enumerate(start.entries.items(), 1)
        if isinstance(e, LowRank)
    }
    return patch_from(start, Adapter(entries, {**start.metadata, "recast.role": "pissa-trained"}))


def unet(checkpoint: Checkpoint, layout: Layout) -> nn.Module:
    from diffusers import UNet2DConditionModel

    net = UNet2DConditionModel(**layout.unet).eval().requires_grad_(False)
    net.load_state_dict(dict(from_file(keymap(layout), checkpoint, "unet")))
    return net


def answer(net: nn.Module, layout: Layout) -> Tensor:
    made = torch.Generator().manual_seed(1)
    more = {}
    if layout.plan.te2 is not None:
        pooled = torch.randn(1, layout.plan.te2.projection, generator=made)
        more = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": torch.ones(1, 6)}}
    context = torch.randn(1, 7, layout.unet["cross_attention_dim"], generator=made)
    x = torch.randn(1, 4, 8, 8, generator=made)
    with torch.no_grad():
        return net(x, torch.tensor(400.5), context, **more).sample


def test_lycoris_makes_the_same_changes(original: Checkpoint, tmp_path: Path) -> None:
    from lycoris.modules import get_module, make_module

    layout = detect(original)
    texts = ",".join(["all", *layout.text_parts])
    low = low_rank_delta(original, layout.sites(texts))
    readout = [site for site in layout.sites("readout") if site.kind != "norm"]
    zeros = zeros_full(original, readout).entries
    full = Adapter(
        {n: Full(moved(e.dense(), i)) for i, (n, e) in enumerate(zeros.items())},
        {"recast.role": "full"},
    )
    for adapter in (low, full):
        path = tmp_path / f"{adapter.role}.safetensors"
        write_adapter(path, adapter)
        file = load_file(path)
        seen = set()
        for name, entry in adapter.entries.items():
            lora, _, param = name.rpartition(".")
            if param == "bias":
                continue
            wide, narrow, *kernel = entry.shape
            bias = f"{lora}.bias" in adapter.entries
            base: nn.Module = nn.Linear(narrow, wide, bias)
            if kernel:
                base = nn.Conv2d(narrow, wide, kernel, bias=bias)
            kind, parts = get_module(file, lora)
            module = make_module(kind, parts, lora, base)
            change, change_of_bias = module.get_diff_weight(1)
            torch.testing.assert_close(
                change.detach().reshape(entry.shape), entry.dense(), atol=1e-6, rtol=1e-5
            )
            if bias:
                wanted = adapter.entries[f"{lora}.bias"].dense()
                torch.testing.assert_close(change_of_bias.detach(), wanted)
            seen |= {key for key in file if key.startswith(lora + ".")}
        assert seen == set(file)


def test_diffusers_and_peft_answer_as_we_do(original: Checkpoint, tmp_path: Path) -> None:
    from diffusers.loaders import StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin

    layout = detect(original)
    sites = layout.sites("all")
    delta = low_rank_delta(original, sites)
    path = tmp_path / "delta.safetensors"
    write_adapter(path, delta)
    net = unet(original, layout)
    before = answer(net, layout)
    start = Adapter(
        {
            n: LowRank(torch.zeros_like(e.up), e.down)
            for n, e in delta.entries.items()
            if isinstance(e, LowRank)
        },
        delta.metadata,
    )
    attached = attach({"unet": net}, start, sites)
    attached.load(delta)
    ours = answer(net, layout)
    attached.detach()
    assert torch.equal(answer(net, layout), before)

    loader = StableDiffusionXLLoraLoaderMixin if layout.plan.te2 else StableDiffusionLoraLoaderMixin
    state, alphas = loader.lora_state_dict(load_file(path), unet_config=net.config)
    assert {key.split(".")[0] for key in state} == {"unet"}
    net.load_lora_adapter(state, network_alphas=alphas, prefix="unet")
    loaded = [m for m in net.modules() if hasattr(m, "lora_A")]
    assert len(loaded) == len(sites)
    theirs = answer(net, layout)
    assert (ours - before).norm() > 1e-2 * before.norm()
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)
