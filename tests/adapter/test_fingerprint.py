"""Fingerprints tell how far a checkpoint is from one that is no longer there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests import tiny

from recast.adapter.fingerprint import (
    SINGLE,
    WHOLE,
    distance,
    fingerprint,
    parse_fingerprint,
    sketch,
)
from recast.checkpoint import Checkpoint, write_dict
from recast.errors import Refused
from recast.layout import detect
from recast.layout.names import UNET


def relative(path: Path, out: Path, share: float, seed: int = 1) -> Path:
    """A copy whose UNet is `share` of its norm away, tensor by tensor."""
    generator = torch.Generator().manual_seed(seed)
    with Checkpoint(path) as file:
        tensors = {key: file[key] for key in file}
        for key in tensors:
            if key.startswith(UNET):
                noise = torch.randn(tensors[key].shape, generator=generator)
                size = share * tensors[key].float().norm() / noise.norm().clamp(min=1e-9)
                tensors[key] = (tensors[key].float() + size * noise).to(tensors[key].dtype)
        write_dict(out, tensors, file.metadata)
    return out


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("print") / "base.safetensors", "sdxl")


@pytest.mark.parametrize("share", [0.01, 0.3])
def test_the_distance_is_the_true_one_nearly(share: float, base: Path, tmp_path: Path) -> None:
    other = relative(base, tmp_path / "other.safetensors", share)
    with Checkpoint(base) as one, Checkpoint(other) as two:
        keys = {site.key for site in detect(one).sites("readout")}
        stored = parse_fingerprint(fingerprint(one, keys).text())
        found = distance(stored, fingerprint(two, keys))
    assert found.unet == pytest.approx(share, rel=0.1)
    assert found.patched == pytest.approx(share, rel=0.2)


def test_the_same_weights_are_no_distance_apart(base: Path) -> None:
    with Checkpoint(base) as one:
        keys = {site.key for site in detect(one).sites("readout")}
        mine = fingerprint(one, keys)
        found = distance(parse_fingerprint(mine.text()), mine)
    assert (found.unet, found.patched) == (0, 0)


def test_a_sketch_keeps_norms_and_is_linear() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(300, 101, generator=generator) for _ in range(2))
    one, two, both = sketch(a, "w"), sketch(b, "w"), sketch(a + b, "w")
    assert one.squared == pytest.approx(a.double().square().sum().item())
    assert one.sums.square().sum().item() == pytest.approx(one.squared, rel=0.15)
    torch.testing.assert_close(one.sums + two.sums, both.sums, atol=1e-4, rtol=0)
    assert not torch.allclose(one.sums, sketch(a, "other").sums)


def test_a_sketch_sees_every_weight_of_a_long_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    long = torch.randn(5 * WHOLE + 7, generator=torch.Generator().manual_seed(0))
    whole = sketch(long, "w")
    monkeypatch.setattr("recast.adapter.fingerprint.CHUNK", 2 * WHOLE)
    torch.testing.assert_close(sketch(long, "w").sums, whole.sums)
    long[-1] += 1
    assert not torch.equal(sketch(long, "w").sums, whole.sums)


def test_signs_are_these_on_every_machine() -> None:
    found = sketch(torch.arange(1.0, SINGLE + 1), "model.diffusion_model.out.2.weight").sums
    assert (found[:SINGLE].abs() == torch.arange(1, SINGLE + 1)).all()
    signs = "".join("+" if value > 0 else "-" for value in found[:16].tolist())
    assert signs == "+++----+++++---+"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "damaged"),
        ("[]", "damaged"),
        ('{"version": 1, "unet": [1, "AAAA"], "tensors": {}}', "damaged"),
        ('{"version": 9}', "version 9"),
    ],
)
def test_a_broken_fingerprint_is_refused(text: str, words: str) -> None:
    with pytest.raises(Refused, match=words):
        parse_fingerprint(text)
