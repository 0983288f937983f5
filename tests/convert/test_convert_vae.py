"""Conversion into another latent space: the file has the VAE it was trained with, and says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.convert import small
from tests.convert.test_convert_refusals import refused

from recast import pocket
from recast.adapter import read_adapter
from recast.checkpoint import Checkpoint, write_dict
from recast.cli_run import with_vae
from recast.convert import Job, exchange
from recast.convert.bridge import Bridge, fit, turned
from recast.errors import Refused
from recast.layout import detect, latents
from recast.layout.names import VAE
from recast.layout.vae import DOOR
from recast.model import open_model
from recast.objective import EPS, FLOW, X0, express
from recast.recipe import Recipe, load, override

SCALE, SHIFT = 0.5, 0.3


def rotation(seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(4, 4, generator=generator))[0]


@pytest.fixture(scope="module")
def strange(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VAE of random weights: no map leads there."""
    folder = tmp_path_factory.mktemp("strange")
    whole = small.checkpoint(folder, "sd15", name="whole")
    with Checkpoint(whole) as file:
        kept = {k: file[k] + 0.3 * torch.randn_like(file[k]) for k in file if k.startswith(VAE)}
    said = {latents.VAE_SCALE: str(SCALE), latents.VAE_SHIFT: str(SHIFT)}
    write_dict(folder / "vae.safetensors", kept, said)
    return folder / "vae.safetensors"


@pytest.fixture(scope="module")
def rotated(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny SDXL's own VAE with its latents rotated, and a scale and shift of its own."""
    path = tmp_path_factory.mktemp("rotated") / "vae.safetensors"
    turn, factor = rotation(), 0.13025 / SCALE
    with Checkpoint(home / "sdxl.safetensors") as file:
        kept = {key: file[key].float() for key in file if key.startswith(VAE)}
    into, out = (VAE + name for name in ("quant_conv.", "post_quant_conv."))
    for name in ("weight", "bias"):
        mean = kept[into + name][:4]
        kept[into + name][:4] = factor * torch.einsum("ij,j...->i...", turn, mean)
    kept[into + "bias"][:4] += SHIFT
    kept[out + "weight"] = torch.einsum("oj...,ij->oi...", kept[out + "weight"], turn) / factor
    kept[out + "bias"] -= SHIFT * kept[out + "weight"].sum((1, 2, 3))
    said = {latents.VAE_SCALE: str(SCALE), latents.VAE_SHIFT: str(SHIFT)}
    write_dict(path, kept, said)
    return path


def recipe(home: Path, vae: Path, objective: str, *, fold: bool = True, **target: str) -> Recipe:
    how = small.recipe(home, objective, steps=2, checkpoint_every=2)
    data = {"vae": str(vae), "vae_fold": fold}
    return override(how, data=data, target=target, watch={"validate_every": 2, "validate_on": 2})


def test_the_file_has_the_vae_that_it_was_trained_with(
    home: Path, strange: Path, tmp_path: Path
) -> None:
    how = recipe(home, strange, "flow", fold=False, teacher="data")
    job = Job(home / "sd15.safetensors", tmp_path, how, images=home / "images")
    small.convert(job)
    with (
        Checkpoint(home / "sd15.safetensors") as before,
        Checkpoint(strange) as vae,
        Checkpoint(tmp_path / "model.safetensors") as after,
    ):
        assert all(after.raw(key) == vae.raw(key) for key in vae)
        changed = {k for k in before if not k.startswith(VAE) and after.raw(k) != before.raw(k)}
        assert "model.diffusion_model.out.2.weight" in changed
        assert after.metadata["recast.base_sha256"] == before.sha256()
        layout = detect(after)
        assert (layout.scaling, layout.shift) == (SCALE, SHIFT)
        assert open_model(after, parts=["vae"]).shift == SHIFT
    with Checkpoint(tmp_path / "patch.safetensors") as patch:
        assert "recast.source" not in patch.metadata
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["psnr_same_noise_db"]["converted"] is None
    assert any("Another VAE" in note for note in report["notes"])


def test_a_stranger_s_space_is_no_place_for_the_teacher(
    home: Path, strange: Path, tmp_path: Path
) -> None:
    how = recipe(home, strange, "flow")
    with pytest.raises(Refused, match=r'set target\.teacher = "data"'):
        small.convert(Job(home / "sd15.safetensors", tmp_path, how, images=home / "images"))


@pytest.mark.slow
def test_over_a_rotation_the_original_stays_what_it_is(
    home: Path, rotated: Path, tmp_path: Path
) -> None:
    """With the same objective nothing is left to learn, and nothing is lost."""
    how = override(recipe(home, rotated, "same"), train={"lr": 1e-9})
    small.convert(Job(home / "sdxl.safetensors", tmp_path, how, images=home / "images"))
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["psnr_same_noise_db"]["converted"] > 35
    assert report["drift"]["against_original"] < 1e-3
    trained = read_adapter(tmp_path / "adapter.safetensors")
    assert any("input_blocks_0_0" in name or "conv_in" in name for name in trained.entries)
    with Checkpoint(rotated) as vae, Checkpoint(tmp_path / "model.safetensors") as after:
        door = {VAE + name for name in DOOR}
        assert {k for k in vae if vae.raw(k) != after.raw(k)} == door
        assert latents.VAE_SCALE not in after.metadata


def test_without_images_the_original_paints_them(home: Path, strange: Path, tmp_path: Path) -> None:
    how = recipe(home, strange, "same", teacher="data")
    small.convert(Job(home / "sd15.safetensors", tmp_path, how, measure=False))
    assert (tmp_path / "bridge.safetensors").exists()
    name = "model.diffusion_model.out.2.weight"
    with (
        Checkpoint(home / "sd15.safetensors") as before,
        Checkpoint(tmp_path / "model.safetensors") as after,
    ):
        assert before.raw(name) != after.raw(name)
        assert all(after[key].isfinite().all() for key in after)


def test_a_bridge_carries_noise_and_answers() -> None:
    generator = torch.Generator().manual_seed(0)
    old, turn = torch.randn(16, 4, 8, 8, generator=generator), rotation()
    offset = torch.tensor([0.1, -0.2, 0.3, 0.0])
    bridge = fit(old, turned(turn, old) + offset[:, None, None])
    torch.testing.assert_close(bridge.matrix, turn, atol=1e-5, rtol=1e-5)
    assert bridge.residual < 1e-5 < bridge.apart
    torch.testing.assert_close(bridge.back(bridge.forth(old)), old, atol=1e-5, rtol=1e-5)
    eps, t = torch.randn(old.shape, generator=generator), torch.linspace(0.1, 0.9, 16)
    for source in (EPS, FLOW, X0):

        def knows(x: torch.Tensor, t: torch.Tensor, source=source) -> torch.Tensor:
            alpha, sigma = (level.view(-1, 1, 1, 1) for level in source.path(t))
            return source.target(old, (x - alpha * old) / sigma, t)

        new, noise = bridge.forth(old), turned(bridge.matrix, eps)
        x = FLOW.noise(new, noise, t)
        found = express(bridge.carried(knows, source), source, FLOW)(x, t)
        torch.testing.assert_close(found, noise - new, atol=2e-3, rtol=2e-3)
        there = bridge.returned(bridge.carried(knows, source), source)
        x = source.noise(old, eps, t)
        torch.testing.assert_close(there(x, t), knows(x, t), atol=1e-3, rtol=1e-3)
    assert isinstance(bridge, Bridge)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--vae", "VAE", "--via", "v"], "in a run of its own"),
        (["--vae", "nowhere.safetensors"], "does not exist"),
        (["--vae-scale", "1"], "give --vae too"),
        (["--vae", "VAE", "--vae-shift", "1"], "give both"),
        (["--vae", "VAE", "--vae-scale", "0"], "above 0"),
    ],
)
def test_a_vae_that_does_not_fit_is_refused(
    words: list[str], wanted: str, home: Path, rotated: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    named = [rotated if word == "VAE" else word for word in words]
    line = ["convert", home / "sdxl.safetensors", *named, "--out", tmp_path / "run"]
    assert wanted in refused(line, tmp_path, capsys)


def test_the_command_line_names_scale_and_shift(home: Path, rotated: Path) -> None:
    how = with_vae(load(), rotated, 0.7, -0.5)
    assert (how.data.vae, how.data.vae_scale, how.data.vae_shift) == (str(rotated), 0.7, -0.5)
    assert with_vae(load(), Path("pocket-eq"), None, None).data.vae == str(pocket.VAE)
    with (
        Checkpoint(home / "sdxl.safetensors") as file,
        exchange.with_vae(file, override(how, vae_fold=False)) as found,
    ):
        layout = detect(found)
    assert (layout.scaling, layout.shift) == (0.7, -0.5)
