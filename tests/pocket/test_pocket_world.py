"""The pocket world: captions, held combinations, drawing, folders."""

from collections import Counter

import pytest
import torch
from PIL import Image

from recast.pocket import NAMES, path
from recast.pocket.world import (
    COLOURS,
    GROUNDS,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    caption,
    is_held,
    parse,
    render,
    scenes,
    write_folder,
)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_captions_name_every_scene_once():
    texts = [caption(scene) for scene in scenes()]
    assert len(set(texts)) == 3200
    assert [parse(text) for text in texts] == scenes()
    assert caption(Scene(3, 0, 2, 1, 1)) == "a big red star on dots at left"


@pytest.mark.parametrize(
    "text", ["", "a star", "a big red star on dots in left", "a big mauve star on dots at left"]
)
def test_other_sentences_are_no_captions(text):
    with pytest.raises(ValueError):
        parse(text)


def test_held_combinations_are_balanced():
    held, trained = scenes(held=True), scenes(held=False)
    assert len(held) == 960
    assert len(trained) == 2240
    for pair in ("shape size", "shape place"):
        counts = Counter(tuple(getattr(scene, name) for name in pair.split()) for scene in held)
        assert len(set(counts.values())) == 1
    for attribute, names in zip(("colour", "ground"), (COLOURS, GROUNDS), strict=True):
        for shape in range(len(SHAPES)):
            met = {getattr(scene, attribute) for scene in trained if scene.shape == shape}
            assert len(met) == len(names) - 1
    assert all(is_held(scene) for scene in held)
    assert len(SIZES) == 2
    assert len(PLACES) == 5


def test_scenes_of_some_shapes():
    chosen = scenes(held=True, shapes={3, 4})
    assert {scene.shape for scene in chosen} == {3, 4}
    assert len(chosen) == 240


def test_drawing_repeats_and_varies_with_the_seed():
    batch = scenes()[::200]
    first, again, other = (render(batch, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (16, 3, 64, 64)
    assert first.abs().max() <= 1


def test_watermark_changes_only_its_corner():
    batch = scenes()[:6]
    marked = torch.tensor([True, False] * 3)
    plain, some = render(batch, generator(0)), render(batch, generator(0), marked)
    changed = (plain != some).any(1)
    assert not changed[1::2].any()
    rows, columns = changed[0].nonzero().unbind(1)
    assert (columns.max() - columns.min() + 1).item() in (15, 16)
    assert (rows.max() - rows.min() + 1).item() in (9, 10)
    assert min(rows.min(), columns.min()) > 40


def test_folder_holds_pictures_and_captions(tmp_path):
    batch = scenes()[:4]
    written = write_folder(tmp_path / "pictures", batch, seed=1, marked_share=0.5)
    assert [parse(file.with_suffix(".txt").read_text().strip()) for file in written] == batch
    for file in written:
        with Image.open(file) as picture:
            assert picture.size == (64, 64)


def test_unknown_checkpoints_are_refused():
    with pytest.raises(ValueError, match="pocket-xl"):
        path("pocket-3")


@pytest.mark.parametrize("name", NAMES)
def test_shipped_files_are_small(name):
    assert path(name).stat().st_size <= 24e6
