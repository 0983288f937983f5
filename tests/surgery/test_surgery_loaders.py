"""LyCORIS, PEFT and diffusers load resized and sliced adapters, and answer as the exact change."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tests import tiny
from tests.adapter.loaders import answer, by_diffusers, by_lycoris, by_peft, change, network
from torch import Tensor

from recast.adapter import Adapter, attach, export, write_adapter
from recast.checkpoint import Checkpoint
from recast.layout import Layout, Site, detect
from recast.lowrank import Full, LowRank
from recast.surgery.resize import resize
from recast.surgery.rules import cut
from recast.surgery.slicing import Cutting, assemble
from recast.surgery.traits import TRAITS

RANK = 3
SOURCES = [
    "kohya.safetensors",
    pytest.param("peft", marks=pytest.mark.slow),
    pytest.param("diffusers.safetensors", marks=pytest.mark.slow),
]


@dataclass(frozen=True)
class Case:
    """A checkpoint, an adapter of rank 8 in each form, and answers of its dense truncation."""

    checkpoint: Checkpoint
    layout: Layout
    sites: list[Site]
    folder: Path
    small: Adapter
    wanted: dict[str, Tensor]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module", params=["sdxl", pytest.param("sd15", marks=pytest.mark.slow)])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("surgery")
    with Checkpoint(tiny.checkpoint(folder / "o.safetensors", request.param)) as checkpoint:
        layout = detect(checkpoint)
        sites = layout.sites(",".join(["lycoris-full", *layout.text_parts]))
        large = change(checkpoint, sites, rank=8)
        write_adapter(folder / "kohya.safetensors", large)
        export(folder / "kohya.safetensors", folder / "peft", "peft", layout=layout)
        export(folder / "kohya.safetensors", folder / "diffusers.safetensors", "diffusers",
               layout=layout)  # fmt: skip
        small = Adapter({name: dense(e) for name, e in large.entries.items()}, large.metadata)
        wanted = {part: answered(checkpoint, layout, small, sites, part) for part in PARTS}
        yield Case(checkpoint, layout, sites, folder, small, wanted)


PARTS = ("unet", "te1")


def dense(entry: LowRank | Full) -> LowRank:
    """The best of RANK, from the SVD of the product."""
    u, s, vh = torch.linalg.svd(entry.dense().flatten(1).double(), full_matrices=False)
    up, down = (u[:, :RANK] * s[:RANK]).float(), vh[:RANK].float()
    return LowRank(up, down.reshape(RANK, *entry.shape[1:]))


def answered(
    checkpoint: Checkpoint, layout: Layout, adapter: Adapter, sites: list[Site], part: str
) -> Tensor:
    net = network(checkpoint, part)
    mine = [s for s in sites if s.part == part and f"{s.lora}.weight" in adapter.entries]
    entries = {f"{site.lora}.weight": adapter.entries[f"{site.lora}.weight"] for site in mine}
    attach({part: net}, Adapter(entries, adapter.metadata), mine)
    return answer(net, layout, part)


def near(found: Tensor, wanted: Tensor) -> None:
    off = float((found - wanted).norm() / wanted.norm())
    assert off < 1e-5, off


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_a_resized_adapter_answers_as_the_dense_truncation(
    case: Case, source: str, tmp_path: Path
) -> None:
    """In the source's own form, and read by that form's own loader."""
    out = tmp_path / Path(source).name
    resize(case.folder / source, [(out, cut(RANK, None, None))], base=case.checkpoint)
    for part, wanted in case.wanted.items():
        net = network(case.checkpoint, part)
        if source == "peft":
            net, count = by_peft(net, out, part)
        elif source == "kohya.safetensors":
            count = by_lycoris(net, out, part, case.sites)
            near(answer(net, case.layout, part), wanted)
            net = network(case.checkpoint, part)
            assert by_diffusers(net, out, part, case.layout.family) == count
        else:
            count = by_diffusers(net, out, part, case.layout.family)
        assert count == sum(site.part == part for site in case.sites)
        near(answer(net, case.layout, part), wanted)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_a_sliced_adapter_changes_its_part_alone(case: Case, source: str, tmp_path: Path) -> None:
    """The UNet at half strength, without text encoders; LyCORIS, PEFT and diffusers agree."""
    out = tmp_path / Path(source).name
    assemble([Cutting(case.folder / source, (TRAITS["unet"],), 0.5)], out, layout=case.layout)
    whole = change(case.checkpoint, case.sites, rank=8)
    entries: dict[str, LowRank | Full] = {
        name: LowRank(0.5 * entry.up, entry.down)
        for name, entry in whole.entries.items()
        if isinstance(entry, LowRank) and name.startswith("lora_unet")
    }
    half = Adapter(entries, whole.metadata)
    wanted = answered(case.checkpoint, case.layout, half, case.sites, "unet")
    unet = [site for site in case.sites if site.part == "unet"]
    net = network(case.checkpoint, "unet")
    if source == "peft":
        net, count = by_peft_alone(net, out)
    elif source == "kohya.safetensors":
        count = by_lycoris(net, out, "unet", unet)
    else:
        count = by_diffusers(net, out, "unet", case.layout.family)
    assert count == len(unet)
    near(answer(net, case.layout, "unet"), wanted)


def by_peft_alone(net: torch.nn.Module, folder: Path) -> tuple[torch.nn.Module, int]:
    """A single network's PEFT files lie in the folder itself, not in one named by the network."""
    (folder.parent / "in").mkdir()
    folder.rename(folder.parent / "in" / "unet")
    return by_peft(net, folder.parent / "in", "unet")
