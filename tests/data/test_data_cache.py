"""Latents and conditions on disk: named by what they depend on, verified when read, remade."""

import multiprocessing
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from PIL import Image
from tests import tiny

from recast.commit import commit
from recast.data import dataset
from recast.data.buckets import Buckets
from recast.data.cache import Store, fetch
from recast.data.dataset import Dataset, prepare
from recast.data.folder import scan
from recast.errors import Refused
from recast.model import Model, open_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = tmp_path_factory.mktemp("tiny") / "xl.safetensors"
    tiny.checkpoint(path, "sdxl", vocabulary=49408, metadata={"recast.size": "32"})
    return open_model(path)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for n in range(5):
        size = (80, 40) if n % 2 else (40, 40)
        Image.effect_noise(size, 60).convert("RGB").save(folder / f"{n}.png")
        (folder / f"{n}.txt").write_text(f"picture {n}")
    return folder


@pytest.fixture
def store(model: Model, tmp_path: Path) -> Store:
    return Store(tmp_path / "cache", model)


def entries(store: Store) -> list[Path]:
    return sorted(store.root.rglob("*.safetensors"))


def outcomes(made: Iterator[dataset.Made]) -> list[str]:
    return [entry.outcome for entry in made]


def test_made_once_and_read_afterwards(store: Store, images: Path) -> None:
    folder = scan(images)
    assert outcomes(prepare(folder, store)) == ["made"] * 5
    assert len(entries(store)) == 10
    before = {path: path.stat().st_mtime_ns for path in entries(store)}
    assert outcomes(prepare(folder, store)) == ["read"] * 5
    assert {path: path.stat().st_mtime_ns for path in entries(store)} == before


def test_a_batch_is_the_pictures_and_their_conditions(store: Store, images: Path) -> None:
    folder = scan(images)
    data = Dataset.of(store, prepare(folder, store))
    got = data.batch(0, seed=1, size=3)
    assert got.x0.shape == (3, 4, 4, 4)
    assert len(got.condition) == 3
    for row, index in enumerate(got.index.tolist()):
        entry = data.entries[index]
        latent = store.encode(entry.example, entry.fit)
        torch.testing.assert_close(got.x0[row], latent, atol=1e-5, rtol=1e-5)
        expected = store.model.condition([entry.example.caption], time_ids=[entry.fit.ids])
        torch.testing.assert_close(got.condition[row].context, expected.context, atol=1e-5, rtol=0)
        torch.testing.assert_close(got.condition[row].pooled, expected.pooled, atol=1e-5, rtol=0)
        assert torch.equal(got.condition[row].time_ids, expected.time_ids)
    again = data.batch(0, seed=1, size=3)
    assert torch.equal(again.x0, got.x0)
    assert torch.equal(again.condition.context, got.condition.context)


def test_size_ids_tell_the_crop(store: Store, images: Path) -> None:
    data = Dataset.of(store, prepare(scan(images), store))
    wide = next(e for e in data.entries if e.example.name == "1.png")
    assert wide.fit.ids == (40, 80, 0, 16, 32, 32)


@pytest.mark.parametrize("damage", ["flip", "cut", "swap", "empty"])
def test_corrupt_entries_are_remade(store: Store, images: Path, damage: str) -> None:
    folder = scan(images)
    data = Dataset.of(store, prepare(folder, store))
    good = data.batch(0, 0, 5)
    paths = entries(store)
    bodies = [path.read_bytes() for path in paths]
    for path, body, other in zip(paths, bodies, bodies[1:] + bodies[:1], strict=True):
        changed = {
            "flip": body[:-3] + bytes([body[-3] ^ 16]) + body[-2:],
            "cut": body[:-5],
            "swap": other,
            "empty": b"",
        }[damage]
        path.write_bytes(changed)
    again = data.batch(0, 0, 5)
    assert torch.equal(again.x0, good.x0)
    torch.testing.assert_close(again.condition.context, good.condition.context)
    assert outcomes(prepare(folder, store)) == ["read"] * 5
    paths[0].write_bytes(b"x")
    folder_outcomes = outcomes(prepare(folder, store))
    assert set(folder_outcomes) <= {"read", "remade"}


def test_changed_pictures_vaes_and_settings_get_entries_of_their_own(
    store: Store, images: Path, tmp_path: Path
) -> None:
    folder = scan(images)
    list(prepare(folder, store))
    Image.new("RGB", (40, 40), "blue").save(images / "0.png")
    assert outcomes(prepare(scan(images), store)) == ["made", *["read"] * 4]
    tight = Buckets(((24, 24),), 576, 8)
    assert outcomes(prepare(folder, store, buckets=tight)) == ["made"] * 5
    assert outcomes(prepare(folder, replace(store, dtype=torch.float16))) == ["made"] * 5
    assert outcomes(prepare(folder, replace(store, background=(0, 0, 0)))) == ["made"] * 5
    path = tiny.checkpoint(tmp_path / "b", "sdxl", seed=9, vocabulary=49408)
    other = open_model(path, parts=("te1", "te2", "vae"))
    other.size = 32
    assert outcomes(prepare(folder, replace(store, model=other))) == ["made"] * 5


def test_broken_pictures_are_named_or_left_out(store: Store, images: Path) -> None:
    whole = (images / "3.png").read_bytes()
    (images / "3.png").write_bytes(whole[: len(whole) // 2])
    folder = scan(images)
    with pytest.raises(Refused, match=r"3\.png.*broken"):
        list(prepare(folder, store))
    made = list(prepare(folder, store, on_broken="skip"))
    assert [bool(entry.problem) for entry in made] == [False, False, False, True, False]
    data = Dataset.of(store, made)
    assert len(data) == len(data.plan) == 4
    with pytest.raises(Refused, match="no examples"):
        Dataset.of(store, [entry for entry in made if entry.problem])


def test_caption_dropout(store: Store, images: Path) -> None:
    data = Dataset.of(store, prepare(scan(images), store))
    empty = store.model.condition([""])
    dropped = data.batch(2, 0, 4, dropout=1.0).condition
    torch.testing.assert_close(dropped.context, empty.context.expand(4, -1, -1), atol=1e-5, rtol=0)
    zero = data.batch(2, 0, 4, dropout=1.0, null="zero").condition
    assert not zero.context.any()
    assert not zero.pooled.any()
    assert zero.time_ids.any()
    plain = data.batch(2, 0, 4).condition
    half = data.batch(2, 0, 4, dropout=0.5, null="zero").condition
    for row in range(4):
        if half.context[row].any():
            assert torch.equal(half.context[row], plain.context[row])


def test_vae_that_makes_nan_is_named(store: Store, images: Path) -> None:
    class Broken:
        size = 32
        factor = 8

        def encode(self, images: torch.Tensor) -> torch.Tensor:
            return torch.full((1, 4, 4, 4), float("nan"))

    entry = next(prepare(scan(images), store))
    with pytest.raises(Refused, match=r"0\.png: the VAE makes NaN"):
        replace(store, model=Broken()).encode(entry.example, entry.fit)  # type: ignore[arg-type]


def test_an_entry_that_another_worker_is_writing_is_written_too(tmp_path: Path) -> None:
    def make() -> dict[str, torch.Tensor]:
        return {"a": torch.ones(3)}

    fetch(tmp_path, {"n": 1}, make)
    path = next(tmp_path.rglob("*.safetensors"))
    whole = path.read_bytes()
    path.unlink()

    def other(file: BinaryIO) -> None:
        assert fetch(tmp_path, {"n": 1}, make)[1] == "made"
        file.write(whole)

    commit(path, other, size=len(whole), force=True, twins=True)
    assert fetch(tmp_path, {"n": 1}, make)[1] == "read"


def hammer(root: Path, worker: int) -> None:
    """Make and read the same entries as every other worker."""
    for turn in range(15):
        key = {"n": turn % 5}
        tensors, _ = fetch(root, key, lambda n=turn % 5: {"a": torch.full((50,), float(n))})
        assert (tensors["a"] == turn % 5).all()


def test_several_workers_make_the_same_entries(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=hammer, args=(tmp_path, n)) for n in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(300)
        assert worker.exitcode == 0
    assert len(list(tmp_path.rglob("*.safetensors"))) == 5
    assert not list(tmp_path.rglob("*tmp*"))
