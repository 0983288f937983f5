"""Training from a dataset file, in another VAE's space: what the file says reaches the loss."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from tests.convert import command, small

from recast.checkpoint import Checkpoint, write_dict
from recast.convert import Job, run, training
from recast.layout import detect, latents
from recast.layout.names import VAE
from recast.recipe import load
from recast.train import Draw

SET = """
[general]
shuffle_caption = true
flip_aug = true
[[datasets]]
batch_size = 2
  [[datasets.subsets]]
  image_dir = "images"
  [[datasets.subsets]]
  image_dir = "masked"
  alpha_mask = true
  loss_weight = 0.25
"""


@pytest.fixture
def place(home: Path, tmp_path: Path) -> Path:
    """A folder with set.toml, its pictures, a recipe of two steps and a VAE of random weights."""
    small.images(tmp_path / "images")
    (tmp_path / "masked").mkdir()
    picture = Image.new("RGBA", (80, 72), (200, 0, 0, 0))
    picture.paste((0, 200, 0, 255), (0, 0, 40, 72))
    picture.save(tmp_path / "masked" / "m.png")
    (tmp_path / "set.toml").write_text(SET)
    (tmp_path / "two.toml").write_text(
        '[target]\nobjective = "same"\nteacher = "data"\n[train]\nprofile = "principal"\n'
        "rank = 1\nsteps = 2\nbatch = 3\n[watch]\nvalidate_every = 0\nalarm = false\n"
    )
    with Checkpoint(home / "sd15.safetensors") as file:
        vae = {k: file[k].float() + 0.01 for k in file if k.startswith(VAE)}
    write_dict(tmp_path / "vae.safetensors", vae)
    return tmp_path


def test_train_from_a_dataset_file_in_another_vae(
    home: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "train", home / "sd15.safetensors", place / "set.toml", "--recipe", place / "two.toml",
        "--vae", place / "vae.safetensors", "--vae-scale", "0.5", "--vae-shift", "0.3",
        "--out", place / "run", "--json",
    ]  # fmt: skip
    command.run(words)
    told = capsys.readouterr()
    assert "train.batch is 2" in told.err
    assert "The cache of images and captions takes" in told.err
    assert set(json.loads(told.out)) >= {"model", "adapter", "patch"}
    with Checkpoint(place / "run" / "model.safetensors") as after:
        layout = detect(after)
        assert after.metadata[latents.VAE_FILE]
        # folded: the file's VAE answers in the family's own scale, from the given scale and shift
        assert layout.scaling == pytest.approx(0.18215)
        with Checkpoint(place / "vae.safetensors") as vae:
            inner = [key for key in vae if ".mid." in key]
            assert inner
            assert all(torch.equal(after[k].float(), vae[k].float()) for k in inner)
    # other settings are another run
    (place / "set.toml").write_text(SET.replace("0.25", "0.5"))
    command.run(words, 2)
    assert "another" in capsys.readouterr().err


def test_weights_and_masks_of_the_file_reach_the_draws(
    home: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    met: list[Draw] = []
    plain = training.checked

    def watched(draws, objective):  # type: ignore[no-untyped-def]
        for draw in plain(draws, objective):
            met.append(draw)
            yield draw

    monkeypatch.setattr(training, "checked", watched)
    (place / "set.toml").write_text(SET.replace("batch_size = 2", "batch_size = 4"))
    how = load(str(place / "two.toml"))
    job = Job(
        home / "sd15.safetensors", place / "run", how, images=place / "set.toml", measure=False
    )
    for _ in run(job):
        pass
    assert len(met) == 2
    for draw in met:
        assert draw.weight is not None
        assert draw.mask is not None
        rows = zip(draw.weight.tolist(), draw.mask.flatten(1).mean(1).tolist(), strict=True)
        assert sorted((weight, round(mask, 1)) for weight, mask in rows) == [
            (0.25, 0.5), (1.0, 1.0), (1.0, 1.0), (1.0, 1.0),
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ("min_bucket_reso = 2000\nmax_bucket_reso = 2048\nenable_bucket = true", "No bucket"),
        ("resolution = 512\nbucket_reso_steps = 60\nenable_bucket = true", "multiple of 8"),
        (
            "resolution = 512\nbucket_reso_steps = 128\nbucket_no_upscale = true",
            "smaller than one bucket step",
        ),
    ],
)
def test_absurd_buckets_are_refused_before_anything_is_written(
    keys: str, said: str, home: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "set.toml").write_text(SET.replace("batch_size = 2", keys))
    words = ["train", home / "sd15.safetensors", place / "set.toml", "--out", place / "run"]
    command.run([*words, "--recipe", place / "two.toml"], 2)
    assert said in capsys.readouterr().err
    assert not (place / "run").exists()
