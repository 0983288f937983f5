"""Batches of varied pictures and captions: made before the run, drawn by (seed, step) alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.data.fake import Fake

from recast.data.batches import epoch
from recast.data.cache import Store
from recast.data.dataset import Batch, Dataset, cache_bytes, prepare, texts
from recast.data.folder import Folder, scan
from recast.data.subset import PLAIN, Subset

VARIED = Subset(
    shuffle_caption=True, caption_tag_dropout_rate=0.2, caption_variants=5, flip_aug=True,
    random_crop=True, color_aug=True, image_variants=4,
)  # fmt: skip
GOLDEN = ["5508afe0", "bd4e8ec3"]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for n in range(4):
        Image.effect_noise((80, 40), 60).convert("RGB").save(folder / f"{n}.png")
        (folder / f"{n}.txt").write_text(f"picture {n}, a, b, c, d")
    return folder


def dataset(folder: Folder, root: Path) -> tuple[Dataset, Fake]:
    fake = Fake()
    store = Store(root / "cache", fake)  # type: ignore[arg-type]
    made = Dataset.of(store, prepare(folder, store))
    return made, fake


def same(one: Batch, other: Batch) -> bool:
    return (
        torch.equal(one.x0, other.x0)
        and torch.equal(one.condition.context, other.condition.context)
        and one.captions == other.captions
    )


def test_every_variant_is_made_before_the_run_and_none_in_it(images: Path, tmp_path: Path) -> None:
    data, fake = dataset(scan(images, how=VARIED), tmp_path)
    assert fake.encoded == 4 * 4
    assert len(set(fake.said)) == len(list(texts(scan(images, how=VARIED))))
    fake.said += [""]  # the empty prompt, which a run encodes first
    data.store.text("")
    before = fake.encoded, len(fake.said)
    seen: dict[int, set[bytes]] = {}
    words: set[str] = set()
    for step in range(60):
        got = data.batch(step, 3, 2, dropout=0.2)
        words.update(got.captions)
        for row, index in enumerate(got.index.tolist()):
            seen.setdefault(index, set()).add(got.x0[row].numpy().tobytes())
    assert (fake.encoded, len(fake.said)) == before
    assert {len(found) for found in seen.values()} == {4}
    assert words <= set(fake.said)
    assert len(words) > 12
    assert "" in words


def test_batches_are_a_function_of_seed_and_step(images: Path, tmp_path: Path) -> None:
    data, _ = dataset(scan(images, how=VARIED), tmp_path)
    again, _ = dataset(scan(images, how=VARIED), tmp_path)
    for step in (7, 0, 3):
        assert same(data.batch(step, 1, 3), again.batch(step, 1, 3))
    assert not same(data.batch(0, 1, 3), data.batch(0, 2, 3))


def test_a_plain_folder_draws_what_it_always_drew(images: Path, tmp_path: Path) -> None:
    # the same pictures among varied ones leave a plain one's entries and captions as they were
    data, _ = dataset(scan(images), tmp_path)
    got = data.batch(0, 0, 4, dropout=0.5)
    for row, index in enumerate(got.index.tolist()):
        entry = data.entries[index]
        assert torch.equal(got.x0[row], data.store.encode(entry.example, entry.fit))
        assert got.captions[row] in ("", entry.example.caption)
    assert got.weight is None
    assert got.mask is None


def test_caption_dropout_of_a_folder_and_of_whole_epochs(images: Path, tmp_path: Path) -> None:
    never = Subset(caption_dropout_rate=0.0, caption_dropout_every_n_epochs=3)
    data, _ = dataset(scan(images, how=never), tmp_path)
    for step in range(24):
        captions = data.batch(step, 0, 2, dropout=1.0).captions
        gone = (epoch(data.plan, step, 2) + 1) % 3 == 0
        assert all((caption == "") == gone for caption in captions)
    always, _ = dataset(scan(images, how=Subset(caption_dropout_rate=1.0)), tmp_path)
    assert set(always.batch(0, 0, 4, dropout=0.0).captions) == {""}


def test_weights_and_masks_of_folders_go_with_their_samples(images: Path, tmp_path: Path) -> None:
    pixels = np.full((80, 40, 4), 255, np.uint8)
    pixels[:40, :, 3] = 0
    Image.fromarray(pixels).save(images / "0.png")
    plain = scan(images)
    masked = Subset(alpha_mask=True, loss_weight=0.5)
    mixed = [replace(e, how=masked if e.name == "0.png" else PLAIN) for e in plain.examples]
    data, _ = dataset(replace(plain, examples=tuple(mixed)), tmp_path)
    got = data.batch(0, 0, 4)
    assert got.weight is not None
    assert got.mask is not None
    for row, index in enumerate(got.index.tolist()):
        is_masked = data.entries[index].example.name == "0.png"
        assert got.weight[row] == (0.5 if is_masked else 1.0)
        assert got.mask[row].mean().item() == pytest.approx(0.5 if is_masked else 1.0, abs=0.01)


def test_changed_masks_and_settings_get_entries_of_their_own(images: Path, tmp_path: Path) -> None:
    Image.new("L", (80, 40), 255).save(tmp_path / "mask.png")
    one = scan(images).examples[0]
    how = Subset(conditioning_data_dir=tmp_path)
    example = replace(one, how=how, mask=tmp_path / "mask.png")
    folder = Folder(images, (example,))
    assert dataset(folder, tmp_path)[0].batch(0, 0, 1).mask.min() == 1  # type: ignore[union-attr]
    Image.new("L", (80, 40), 51).save(tmp_path / "mask.png")
    mask = dataset(folder, tmp_path)[0].batch(0, 0, 1).mask
    assert mask is not None
    assert mask.mean().item() == pytest.approx(0.2)
    fake = dataset(Folder(images, (replace(one, how=VARIED),)), tmp_path)[1]
    assert fake.encoded == 4
    assert dataset(Folder(images, (replace(one, how=VARIED),)), tmp_path)[1].encoded == 0


def test_the_size_of_the_cache_is_told_beforehand(images: Path, tmp_path: Path) -> None:
    folder = scan(images, how=VARIED)
    store = Store(tmp_path / "cache", Fake())  # type: ignore[arg-type]
    told = cache_bytes(folder, store)
    list(prepare(folder, store))
    real = sum(path.stat().st_size for path in store.root.rglob("*.safetensors"))
    assert told == pytest.approx(real, rel=0.15)


def test_a_broken_picture_keeps_its_name_among_varied_ones(images: Path, tmp_path: Path) -> None:
    (images / "1.png").write_bytes((images / "1.png").read_bytes()[:400])
    store = Store(tmp_path / "cache", Fake())  # type: ignore[arg-type]
    made = list(prepare(scan(images, how=VARIED), store, on_broken="skip"))
    assert [bool(entry.problem) for entry in made] == [False, True, False, False]
    assert len(Dataset.of(store, made)) == 3


def test_entries_of_a_plain_folder_have_the_names_they_always_had(tmp_path: Path) -> None:
    # of pictures whose bytes no library writes: what is cached already is found again
    raw = bytes(k % 251 for k in range(40 * 36 * 3))
    head = b"BM" + (54 + 120 * 36).to_bytes(4, "little") + bytes(4) + (54).to_bytes(4, "little")
    sizes = b"".join(n.to_bytes(4, "little") for n in (40, 40, 36))
    (tmp_path / "a.bmp").write_bytes(
        head + sizes + (1).to_bytes(2, "little") + (24).to_bytes(2, "little") + bytes(24) + raw
    )
    (tmp_path / "a.txt").write_text("one,  two\nthree")
    data, _ = dataset(scan(tmp_path), tmp_path)
    names = sorted(path.name[:8] for path in data.store.root.rglob("*.safetensors"))
    assert names == GOLDEN
