"""A residual is half a model: where it may be used, with what beside it, and where it may not."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tests import tiny

from recast.adapter import (
    Adapter,
    apply_patch,
    decompose,
    extract_difference,
    extract_trained,
    read_adapter,
    rebuild,
    split,
    verify_rebuilt,
    verify_split,
    zeros_full,
)
from recast.checkpoint import Checkpoint
from recast.errors import Refused
from recast.layout import detect
from recast.layout.names import split_parts
from recast.model import open_model
from recast.verification import Question, split_answers


@pytest.fixture(scope="module", params=["sdxl", "sd15"])
def halves(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Checkpoint, Checkpoint, Adapter]]:
    """A checkpoint, its residual and its adapter, split in the UNet and the text encoders."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("halves")
    with Checkpoint(tiny.checkpoint(folder / "o.safetensors", request.param)) as original:
        layout = detect(original)
        sites = layout.sites(",".join(["principal", *layout.text_parts]))
        split(original, sites, 2, folder)
        with Checkpoint(folder / "residual.safetensors") as residual:
            yield original, residual, read_adapter(folder / "adapter.safetensors")


def only(adapter: Adapter, pattern: str) -> Adapter:
    entries = {name: e for name, e in adapter.entries.items() if re.match(pattern, name)}
    return Adapter(entries, adapter.metadata)


def test_a_residual_names_what_was_split(
    halves: tuple[Checkpoint, Checkpoint, Adapter], tmp_path: Path
) -> None:
    original, residual, adapter = halves
    parts = split_parts(residual.metadata)
    assert list(parts) == ["unet", *detect(original).text_parts]
    assert sum(parts.values()) == len(adapter.entries)
    split(original, detect(original).sites("principal"), 2, tmp_path)
    with Checkpoint(tmp_path / "residual.safetensors") as rest:
        assert split_parts(rest.metadata) == {"unet": parts["unet"]}
        text = [key for key in original.specs if "text_model" in key or "embedders" in key]
        assert text
        assert all(rest.raw(key) == original.raw(key) for key in text)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("lora_unet_", "0 of .* of the text encoder"),
        ("lora_te", "0 of .* of the UNet"),
        ("lora_unet_(?!.*attn1_to_q)|lora_te", r"of the UNet: the UNet would"),
    ],
)
def test_a_part_without_its_adapter_is_refused(
    halves: tuple[Checkpoint, Checkpoint, Adapter], pattern: str, words: str
) -> None:
    original, residual, adapter = halves
    part = only(adapter, pattern)
    assert part.entries
    with pytest.raises(Refused, match=words):
        verify_split(original, residual, part)
    with pytest.raises(Refused, match=words):
        split_answers(original, residual, part, Question())
    assert verify_split(original, residual, adapter).passed


PLACES: dict[str, Callable[[Checkpoint, Checkpoint, Adapter], object]] = {
    "open": lambda original, rest, adapter: open_model(rest, parts=("unet",)),
    "split": lambda original, rest, adapter: split(
        rest, detect(rest).sites("principal"), 2, rest.path.parent / "again"
    ),
    "decompose": lambda original, rest, adapter: decompose(rest, detect(rest).sites("OUT01"), 2),
    "zeros": lambda original, rest, adapter: zeros_full(rest, detect(rest).sites("OUT")),
    "rebuild": lambda original, rest, adapter: list(rebuild(rest, adapter, adapter)),
    "patch": lambda original, rest, adapter: list(
        apply_patch(rest, Adapter(adapter.entries, {}), other_base=True)
    ),
    "extract": lambda original, rest, adapter: extract_trained(rest, adapter, adapter),
    "base": lambda original, rest, adapter: extract_difference(rest, original, []),
    "tuned": lambda original, rest, adapter: extract_difference(original, rest, []),
    "verify original": lambda original, rest, adapter: verify_rebuilt(rest, original),
    "verify rebuilt": lambda original, rest, adapter: verify_rebuilt(original, rest),
}


@pytest.mark.parametrize("place", PLACES)
def test_no_place_takes_a_residual_for_a_model(
    halves: tuple[Checkpoint, Checkpoint, Adapter], place: str
) -> None:
    with pytest.raises(Refused, match="residual"):
        PLACES[place](*halves)
    assert not (halves[1].path.parent / "again").exists()
