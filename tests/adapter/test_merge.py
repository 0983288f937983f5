"""Merging two checkpoints of one objective: what may be merged, and weights by block."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests import tiny

from recast.adapter.merge import shares_of
from recast.checkpoint import Checkpoint, write_dict
from recast.errors import CheckFailed, Refused
from recast.layout import detect
from recast.surgery.merging import write_merge
from recast.surgery.recipes import Step, parse_weights

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


def merged(a: Checkpoint, b: Checkpoint, key: str, share: float) -> torch.Tensor:
    """a + share (b - a) in fp32, rounded once."""
    mixed = torch.lerp(a[key].float(), b[key].float(), share).to(a[key].dtype)
    return mixed if share else a[key]


def test_blocks_get_their_own_shares(pair: tuple[Path, Path], tmp_path: Path) -> None:
    shares = parse_weights("0.5,te1=0,OUT0*=0.25,OUT08=1.0,IN00=0.1,vae=0")
    wanted = {OUT08: 1, f"{UNET}output_blocks.1.0.in_layers.2.weight": 0.25}
    wanted |= {IN: 0.1, VAE: 0, TE1: 0, f"{UNET}middle_block.0.in_layers.2.weight": 0.5}
    out = tmp_path / "merged.safetensors"
    with Checkpoint(pair[0]) as a, Checkpoint(pair[1]) as b:
        write_merge(Step("weighted", pair, (shares,)), out)
        with Checkpoint(out) as found:
            assert list(found.specs.items()) == list(a.specs.items())
            for key, share in wanted.items():
                assert torch.equal(found[key], merged(a, b, key, share)), key
            about = json.loads(found.metadata["recast.merge"])
            assert [each["sha256"] for each in about["models"]] == [a.sha256(), b.sha256()]
            assert about["weights"] == [",".join(shares.texts())]
            assert found.metadata["recast.size"] == "64"
            assert not {"recast.run", "sshs_model_hash"} & found.metadata.keys()
            assert not detect(found).missing


def test_every_weight_of_every_network_is_covered(pair: tuple[Path, Path]) -> None:
    with Checkpoint(pair[0]) as a, Checkpoint(pair[1]) as b:
        plan = shares_of(a, b, parse_weights(0.5))
        assert set(plan.values()) == {0.5}
        assert set(a.specs) - plan.keys() == set(detect(a).extras)


def test_a_sum_out_of_range_is_no_result(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with Checkpoint(pair[1]) as b:
        tensors = {key: b[key] * 1e9 if key == IN else b[key] for key in b}
        write_dict(tmp_path / "huge", tensors, b.metadata)
    step = Step("weighted", (pair[0], tmp_path / "huge"), (parse_weights(0.5),))
    with pytest.raises(CheckFailed, match="bf16"):
        write_merge(step, tmp_path / "o")
    assert not (tmp_path / "o").exists()


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
        shares_of(a, b, parse_weights(0.5))


@pytest.mark.parametrize(
    ("given", "words"),
    [("OUT99=1", "is it OUT"), ("half", "no number"), ("te=2", "at most 1"), ("nan", "finite")],
)
def test_a_weight_that_means_nothing_is_refused(
    given: str, words: str, pair: tuple[Path, Path]
) -> None:
    with (
        Checkpoint(pair[0]) as a,
        Checkpoint(pair[1]) as b,
        pytest.raises(Refused, match=words),
    ):
        Step("weighted", pair, (parse_weights(given),)) and shares_of(a, b, parse_weights(given))
