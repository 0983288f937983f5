"""Merging two checkpoints of one objective, block by block."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests import tiny

from recast.adapter.merge import merged, shares_of, weighted, weights, write_merged
from recast.checkpoint import Checkpoint
from recast.errors import CheckFailed, Refused
from recast.layout import detect

UNET = "model.diffusion_model."
OUT08 = f"{UNET}output_blocks.8.0.in_layers.2.weight"
IN = f"{UNET}input_blocks.0.0.weight"
VAE = "first_stage_model.decoder.conv_out.weight"
TE1 = "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("merge")
    about = {"recast.run": "mine", "recast.size": "64", "sshs_model_hash": "old"}
    a = tiny.checkpoint(folder / "a.safetensors", "sdxl", dtype="F16", metadata=about)
    return a, tiny.checkpoint(folder / "b.safetensors", "sdxl", seed=1)


def test_a_share_of_0_or_1_keeps_the_bits() -> None:
    a, b = torch.randn(5).half(), torch.randn(5)
    assert weighted(a, b, 0) is a
    assert torch.equal(weighted(a, b, 1), b.half())
    mixed = weighted(a, b, 0.25)
    assert mixed.dtype == a.dtype
    assert torch.equal(mixed, (a.float() + 0.25 * (b - a.float())).half())


def test_blocks_get_their_own_shares(pair: tuple[Path, Path], tmp_path: Path) -> None:
    shares = weights(["0.5", "te1=0", "OUT0*=0.25", "OUT08=1.0", "IN00=0.1", "vae=0"])
    wanted = {OUT08: 1, f"{UNET}output_blocks.1.0.in_layers.2.weight": 0.25}
    wanted |= {IN: 0.1, VAE: 0, TE1: 0, f"{UNET}middle_block.0.in_layers.2.weight": 0.5}
    out = tmp_path / "merged.safetensors"
    with Checkpoint(pair[0]) as a, Checkpoint(pair[1]) as b:
        write_merged(a, b, shares, out)
        with Checkpoint(out) as found:
            assert list(found.specs.items()) == list(a.specs.items())
            for key, share in wanted.items():
                assert torch.equal(found[key], weighted(a[key], b[key], share)), key
            about = json.loads(found.metadata["recast.merge"])
            assert about["a"] == a.sha256()
            assert about["b"] == b.sha256()
            assert about["weights"] == shares.texts()
            assert found.metadata["recast.size"] == "64"
            assert not {"recast.run", "sshs_model_hash"} & found.metadata.keys()
            assert not detect(found).missing


def test_every_weight_of_every_network_is_covered(pair: tuple[Path, Path]) -> None:
    with Checkpoint(pair[0]) as a, Checkpoint(pair[1]) as b:
        plan = shares_of(a, b, weights([]))
        assert set(plan.values()) == {0.5}
        assert set(a.specs) - plan.keys() == set(detect(a).extras)


def test_a_sum_out_of_range_is_no_result(pair: tuple[Path, Path]) -> None:
    with Checkpoint(pair[0]) as a, Checkpoint(pair[1]) as b:

        class Huge(dict):
            def __getitem__(self, key: str) -> torch.Tensor:
                return b[key] + 1e6

        with pytest.raises(CheckFailed, match="bf16"):
            list(merged(a, Huge(), {IN: 0.5}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"family": "sd15"}, "one family"),
        ({"metadata": {"recast.objective": "flow"}}, "predicts eps and"),
        ({"metadata": {"modelspec.prediction_type": "v"}}, "does not say clearly"),
        ({"metadata": {"recast.role": "residual"}}, "residual"),
    ],
)
def test_what_cannot_be_mixed_is_refused(
    other: dict, words: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    options = {"family": "sdxl", **other}
    path = tiny.checkpoint(tmp_path / "other.safetensors", **options)
    with (
        Checkpoint(pair[0]) as a,
        Checkpoint(path) as b,
        pytest.raises(Refused, match=words),
    ):
        shares_of(a, b, weights([]))


@pytest.mark.parametrize(
    ("given", "words"),
    [("OUT99=1", "is it OUT"), ("half", "no number"), ("te=2", "from 0 to 1"), ("nan", "from 0")],
)
def test_a_weight_that_means_nothing_is_refused(
    given: str, words: str, pair: tuple[Path, Path]
) -> None:
    with (
        Checkpoint(pair[0]) as a,
        Checkpoint(pair[1]) as b,
        pytest.raises(Refused, match=words),
    ):
        shares_of(a, b, weights([given]))
