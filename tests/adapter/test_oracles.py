"""Other people's code reads our adapter file and gets the same weights and the same outputs."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests import tiny
from torch import Tensor, nn

from recast.adapter import Adapter, patch_from, write_adapter, zeros_full
from recast.adapter.decompose import decompose
from recast.checkpoint import Checkpoint
from recast.layout import Site, detect
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
