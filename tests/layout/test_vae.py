"""A checkpoint with another VAE: from every kind of file, folded or stated, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests import tiny

from recast.checkpoint import Checkpoint, write_dict
from recast.errors import Refused
from recast.layout import detect, from_file, keymap, latents, open_checkpoint
from recast.layout.generate import generate
from recast.layout.names import VAE
from recast.layout.vae import exchanged
from recast.model import open_model
from recast.model.folder import write_folder

SCALE, SHIFT = 0.5, 0.3


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and another whose VAE is wanted, that VAE in every form."""
    folder = tmp_path_factory.mktemp("vae")
    tiny.checkpoint(folder / "model.safetensors", metadata={"recast.size": "64"})
    other = tiny.checkpoint(folder / "other.safetensors", seed=7)
    with Checkpoint(other) as file:
        entries = keymap(detect(file))
        theirs = {name: tensor.contiguous() for name, tensor in from_file(entries, file, "vae")}
        ours = {key: file[key] for key in file if key.startswith(VAE)}
    bare = {key.removeprefix(VAE): tensor for key, tensor in ours.items()}
    write_dict(folder / "prefixed.safetensors", ours)
    write_dict(folder / "bare.safetensors", bare)
    said = {latents.VAE_SCALE: str(SCALE), latents.VAE_SHIFT: str(SHIFT)}
    write_dict(folder / "stated.safetensors", bare, said)
    write_dict(folder / "theirs.safetensors", theirs)
    (folder / "vae").mkdir()
    write_dict(folder / "vae" / "diffusion_pytorch_model.safetensors", theirs)
    config = {
        "_class_name": "AutoencoderKL", "block_out_channels": list(tiny.VAE.widths),
        "layers_per_block": 1, "latent_channels": 4, "scaling_factor": SCALE, "shift_factor": SHIFT,
    }  # fmt: skip
    (folder / "vae" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def given(home: Path, name: str, *, fold: bool = False, known: bool = False) -> Checkpoint:
    scale, shift = (None, None) if known else (SCALE, SHIFT)
    original = Checkpoint(home / "model.safetensors")
    return exchanged(original, home / name, scale, shift, fold=fold)


@pytest.mark.parametrize(
    "name",
    ["other.safetensors", "prefixed.safetensors", "bare.safetensors", "theirs.safetensors", "vae"],
)
def test_every_form_of_a_vae_gives_the_same_checkpoint(name: str, home: Path) -> None:
    with (
        Checkpoint(home / "model.safetensors") as before,
        Checkpoint(home / "other.safetensors") as other,
        given(home, name) as found,
    ):
        assert set(found) == set(before)
        for key in found:
            wanted = other if key.startswith(VAE) else before
            assert found.raw(key) == wanted.raw(key), key
        layout = detect(found)
        assert (layout.scaling, layout.shift) == (SCALE, SHIFT)
        assert found.sha256() == before.sha256()


@pytest.mark.parametrize("name", ["stated.safetensors", "vae"])
def test_scale_and_shift_are_read_where_they_are_stated(name: str, home: Path) -> None:
    with given(home, name, known=True) as found:
        layout = detect(found)
        assert (layout.scaling, layout.shift) == (SCALE, SHIFT)


def test_a_folded_vae_makes_the_same_latents_under_the_family_s_scale(home: Path) -> None:
    pictures = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with given(home, "vae") as stated, given(home, "vae", fold=True) as folded:
        one, other = (open_model(file, parts=["vae"]) for file in (stated, folded))
    assert (other.scaling, other.shift) == (0.13025, 0.0)
    with torch.no_grad():
        z = one.encode(pictures)
        torch.testing.assert_close(other.encode(pictures), z, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(other.decode(z), one.decode(z), rtol=1e-4, atol=1e-4)
        spreads = [m.vae.encode(pictures).latent_dist.std * m.scaling for m in (one, other)]
    torch.testing.assert_close(spreads[1], spreads[0], rtol=1e-4, atol=1e-5)
    assert z.std() > 1e-3


def test_scale_and_shift_go_through_files_and_folders(home: Path, tmp_path: Path) -> None:
    with given(home, "vae") as found:
        tensors = {key: found[key] for key in found}
        write_dict(tmp_path / "model.safetensors", tensors, found.metadata)
    with Checkpoint(tmp_path / "model.safetensors") as file:
        write_folder(file, tmp_path / "folder")
    config = json.loads((tmp_path / "folder/vae/config.json").read_text(encoding="utf-8"))
    assert (config["scaling_factor"], config["shift_factor"]) == (SCALE, SHIFT)
    (tmp_path / "folder/recast.safetensors").unlink()
    with open_checkpoint(tmp_path / "folder") as back:
        model = open_model(back, parts=["vae"])
    assert (model.scaling, model.shift) == (SCALE, SHIFT)


def test_what_does_not_fit_is_refused(home: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="does not state the scale of its latents: give --vae-scale"):
        given(home, "bare.safetensors", known=True)
    for name, vae, wanted in (
        ("wide", replace(tiny.VAE, latent=16), "latents of 16 channels"),
        ("coarse", replace(tiny.VAE, widths=(32, 32, 64)), "shrinks pictures 4 times"),
    ):
        whole = tmp_path / f"{name}-model.safetensors"
        plan = replace(tiny.plan("sdxl"), vae=vae)
        generate(whole, plan, seed=0, dtype="F32", metadata={}, extras=False)
        with Checkpoint(whole) as file:
            found = {key: file[key] for key in file if key.startswith(VAE)}
        write_dict(tmp_path / f"{name}.safetensors", found)
        with (
            Checkpoint(home / "model.safetensors") as original,
            pytest.raises(Refused, match=wanted),
        ):
            exchanged(original, tmp_path / f"{name}.safetensors", 1.0, 0.0, fold=False)
    with Checkpoint(home / "bare.safetensors") as file:
        found = {key: file[key] for key in file if key != "decoder.conv_out.bias"}
    write_dict(tmp_path / "short.safetensors", found)
    with Checkpoint(home / "model.safetensors") as original:
        with pytest.raises(Refused, match=r"lacks the VAE's decoder\.conv_out\.bias"):
            exchanged(original, tmp_path / "short.safetensors", 1.0, 0.0, fold=False)
        write_dict(tmp_path / "lora.safetensors", {"a.lora_up.weight": torch.zeros(2, 2)})
        with pytest.raises(Refused, match="holds no VAE"):
            exchanged(original, tmp_path / "lora.safetensors", 1.0, 0.0, fold=False)


@pytest.mark.parametrize(("key", "value"), [("scale", "none"), ("scale", "-1"), ("shift", "nan")])
def test_a_header_that_states_nonsense_is_refused(key: str, value: str, home: Path) -> None:
    with Checkpoint(home / "model.safetensors") as file:
        file.metadata[f"recast.vae_{key}"] = value
        with pytest.raises(Refused, match=f"recast.vae_{key}"):
            detect(file)
