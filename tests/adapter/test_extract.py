"""Delta LoRAs: from a run and from two checkpoints, exact, truncated, and in 16 bit."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests import tiny
from torch import Tensor

from recast.adapter import (
    Adapter,
    decompose,
    extract_difference,
    extract_trained,
    read_adapter,
    rebuild,
    split,
    write_adapter,
    write_rebuilt,
    zeros_full,
)
from recast.checkpoint import Checkpoint
from recast.errors import Refused
from recast.layout import Site, detect
from recast.lowrank import Full, LowRank


@pytest.fixture(scope="module", params=["sdxl", "sd15"])
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("tiny")
    with Checkpoint(tiny.checkpoint(folder / "o.safetensors", request.param)) as checkpoint:
        yield checkpoint


def sites(checkpoint: Checkpoint) -> list[Site]:
    layout = detect(checkpoint)
    return layout.sites(",".join(["principal", *layout.text_parts]))


def trained(start: Adapter, size: float, seed: int = 5) -> Adapter:
    """Factors after a relative change of the given size."""
    made = torch.Generator().manual_seed(seed)

    def moved(tensor: Tensor) -> Tensor:
        noise = torch.randn(tensor.shape, generator=made)
        return tensor + size * tensor.norm() / noise.norm() * noise

    entries: dict[str, LowRank | Full] = {
        name: LowRank(moved(e.up), moved(e.down))
        if isinstance(e, LowRank)
        else Full(moved(e.delta))
        for name, e in start.entries.items()
    }
    return Adapter(entries, {**start.metadata, "recast.role": "pissa-trained"})


def off(made: Adapter, wanted: dict[str, Tensor]) -> float:
    """Relative distance over all entries."""
    gap = sum((made.entries[n].dense() - w).double().square().sum() for n, w in wanted.items())
    return float((gap / sum(w.double().square().sum() for w in wanted.values())) ** 0.5)


def truth(start: Adapter, end: Adapter) -> dict[str, Tensor]:
    found = {}
    for name, entry in end.entries.items():
        first = start.entries[name]
        assert isinstance(entry, LowRank)
        assert isinstance(first, LowRank)
        found[name] = (
            LowRank(entry.up.double(), entry.down.double()).dense()
            - LowRank(first.up.double(), first.down.double()).dense()
        )
    return found


def test_twice_the_rank_is_exact_and_survives_16_bit(original: Checkpoint, tmp_path: Path) -> None:
    start = decompose(original, sites(original), 4).to(torch.bfloat16).to(torch.float32)
    end = trained(start, 0.01)
    found = extract_trained(original, start, end)
    assert found.adapter.role == "delta"
    assert found.error == 0
    assert {e.rank for e in found.adapter.entries.values() if isinstance(e, LowRank)} == {8}
    wanted = truth(start, end)
    assert off(found.adapter, wanted) < 1e-5
    for dtype, most in (("BF16", 3e-3), ("F16", 5e-4)):
        write_adapter(tmp_path / dtype, found.adapter, dtype=dtype)
        assert off(read_adapter(tmp_path / dtype), wanted) < most


def test_a_change_of_one_percent_is_kept_in_bf16(original: Checkpoint, tmp_path: Path) -> None:
    """PEFT's concatenation [B | -B0] [A ; A0] loses 19 % of it; ours at most 0.3 %."""
    start = decompose(original, sites(original)[:40], 8).to(torch.bfloat16).to(torch.float32)
    end = trained(start, 0.01)
    wanted = truth(start, end)
    entries: dict[str, LowRank | Full] = {}
    for name, entry in end.entries.items():
        first = start.entries[name]
        assert isinstance(entry, LowRank)
        assert isinstance(first, LowRank)
        up = torch.cat([entry.up, -first.up], 1)
        entries[name] = LowRank(up, torch.cat([entry.down, first.down])).to(torch.bfloat16)
    assert off(Adapter(entries), wanted) == pytest.approx(0.19, abs=0.03)
    write_adapter(tmp_path / "a", extract_trained(original, start, end).adapter, dtype="BF16")
    assert off(read_adapter(tmp_path / "a"), wanted) <= 3e-3


def test_truncation_says_its_error(original: Checkpoint) -> None:
    start = decompose(original, sites(original), 4)
    end = trained(start, 0.05)
    wanted = truth(start, end)
    for rule in (4, "energy:0.9", "error:0.2", ["2", "conv=6"]):
        found = extract_trained(original, start, end, rule)
        assert found.error == pytest.approx(off(found.adapter, wanted), rel=1e-3, abs=1e-6)
    assert extract_trained(original, start, end, "error:0.2").error <= 0.2
    some = extract_trained(original, start, end, "score:-2.5").adapter
    for name, delta in wanted.items():
        site = next(s for s in sites(original) if f"{s.lora}.weight" == name)
        place = original[site.key]
        weight = place if site.rows is None else place[slice(*site.rows)]
        kept = torch.linalg.svdvals(delta.flatten(1)) >= 10**-2.5 * weight.float().norm()
        entry = some.entries.get(name)
        assert (entry.rank if isinstance(entry, LowRank) else 0) == kept.sum()


def test_text_encoders_of_another_epoch_and_slices(original: Checkpoint) -> None:
    start = decompose(original, sites(original), 2)
    early, late = trained(start, 0.02, seed=1), trained(start, 0.02, seed=2)
    found = extract_trained(original, start, late, texts=early).adapter
    unet = {n: d for n, d in truth(start, late).items() if n.startswith("lora_unet")}
    text = {n: d for n, d in truth(start, early).items() if n.startswith("lora_te")}
    assert off(found, unet | text) < 1e-5
    change = extract_trained(original, start, early, parts=["te"]).adapter
    assert change.entries.keys() == text.keys()
    again = extract_trained(original, start, late, texts=change).adapter
    assert off(again, unet | text) < 1e-5
    with pytest.raises(Refused, match="no part"):
        extract_trained(original, start, late, parts=["vae"])


def test_two_checkpoints_without_a_split(original: Checkpoint, tmp_path: Path) -> None:
    start = decompose(original, sites(original), 3)
    end = trained(start, 0.05)
    write_rebuilt(original, start, end, tmp_path / "tuned.safetensors")
    with Checkpoint(tmp_path / "tuned.safetensors") as tuned:
        found = extract_difference(original, tuned, sites(original), 6)
        assert found.error < 1e-3
        assert off(found.adapter, truth(start, end)) < 1e-3
        assert found.left_out == ()
        assert found.adapter.base == original.sha256()
        part = extract_difference(original, tuned, sites(original)[:3], 6)
        assert len(part.left_out) > 3
        with pytest.raises(Refused, match="equal in every"):
            extract_difference(original, original, sites(original))
    wanted = dict(rebuild(original, start, end))
    for key, tensor in rebuild(original, None, found.adapter):
        torch.testing.assert_close(tensor, wanted[key], atol=1e-4, rtol=1e-3)


def test_full_changes_are_kept_whole(original: Checkpoint) -> None:
    start = zeros_full(original, detect(original).sites("OUT"))
    entries: dict[str, LowRank | Full] = {
        name: Full(torch.ones_like(e.dense())) for name, e in start.entries.items()
    }
    found = extract_trained(original, start, Adapter(entries, start.metadata), "energy:0.5")
    assert found.adapter.role == "full"
    assert all(bool((e.dense() == 1).all()) for e in found.adapter.entries.values())


def test_what_cannot_be_extracted_is_refused(original: Checkpoint, tmp_path: Path) -> None:
    start = decompose(original, sites(original), 2)
    end = trained(start, 0.02)
    with pytest.raises(Refused, match="--initial"):
        extract_trained(original, None, end)
    with pytest.raises(Refused, match="nothing to extract"):
        extract_trained(original, start, start)
    family = detect(original).family
    other = tiny.checkpoint(tmp_path / "other.safetensors", family, seed=9)
    with Checkpoint(other) as stranger, pytest.raises(Refused, match="belongs to the checkpoint"):
        extract_trained(stranger, start, end)
    kind = "sd15" if family == "sdxl" else "sdxl"
    with (
        Checkpoint(tiny.checkpoint(tmp_path / "k.safetensors", kind)) as odd,
        pytest.raises(Refused, match="one architecture"),
    ):
        extract_difference(original, odd, sites(original))
    split(original, sites(original)[:2], 2, tmp_path)
    with (
        Checkpoint(tmp_path / "residual.safetensors") as rest,
        pytest.raises(Refused, match="residual"),
    ):
        extract_difference(original, rest, sites(original))
