"""Assessors on disk."""

from pathlib import Path

import pytest
import torch
from tests.distill.small_assessor import pooled, small

from recast.checkpoint import Checkpoint, write_dict
from recast.distill.store import read_assessor, write_assessor
from recast.errors import Refused

FINGERPRINT = {"architecture": "UNet", "blocks": "down_0,mid", "objective": "eps"}


def test_an_assessor_comes_back_bit_by_bit(tmp_path: Path) -> None:
    made = small()
    made.standardise(pooled(100))
    path = tmp_path / "assessor.safetensors"
    facts = {"accuracy": {"mid": [0.5, 0.25]}, "n": 3}
    write_assessor(path, made, FINGERPRINT, facts)
    back, said = read_assessor(path, FINGERPRINT)
    assert said == facts
    assert back.shape == made.shape
    for name, value in made.state_dict().items():
        assert torch.equal(value, back.state_dict()[name]), name
    assert torch.equal(back(pooled())["mid"].time_logits, made(pooled())["mid"].time_logits)
    assert not any(each.requires_grad for each in back.parameters())


def test_an_assessor_of_another_network_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "assessor.safetensors"
    write_assessor(path, small(), FINGERPRINT, {})
    for name, value in (("objective", "flow"), ("architecture", "Other"), ("blocks", "mid")):
        with pytest.raises(Refused, match=f"its {name} is"):
            read_assessor(path, {**FINGERPRINT, name: value})
    with pytest.raises(Refused, match="its where is None"):
        read_assessor(path, {**FINGERPRINT, "where": "post_block"})


def test_files_that_are_no_assessor_are_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    write_dict(other, {"a": torch.zeros(2)})
    with pytest.raises(Refused, match="is no assessor"):
        read_assessor(other)
    path = tmp_path / "assessor.safetensors"
    write_assessor(path, small(), FINGERPRINT, {})
    with Checkpoint(path) as file:
        tensors, about = dict(file), dict(file.metadata)
    missing = {name: each for name, each in tensors.items() if name != "probes.mid.rho"}
    write_dict(other, missing, about, force=True)
    with pytest.raises(Refused, match=r"probes\.mid\.rho"):
        read_assessor(other)
    write_dict(other, tensors, {**about, "recast.shape": '{"d": 4}'}, force=True)
    with pytest.raises(Refused, match="shape is damaged"):
        read_assessor(other)
    write_dict(other, tensors, {**about, "recast.facts": "{"}, force=True)
    with pytest.raises(Refused, match=r"recast\.facts is missing or damaged"):
        read_assessor(other)
