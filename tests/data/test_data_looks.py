"""Ways to show a picture: crops, mirrors and colours, their size ids, and masks that go along."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from recast.data.buckets import apply, fit
from recast.data.folder import Example
from recast.data.looks import looks
from recast.data.masks import mask_of
from recast.data.subset import PLAIN, Sizes, Subset
from recast.errors import Refused

SIZE, TARGET = (160, 80), (64, 64)


def test_a_plain_folder_shows_the_centre_once() -> None:
    assert looks(SIZE, TARGET, PLAIN, "x") == (fit(SIZE, TARGET),)
    assert len(fit(SIZE, TARGET).key) == 4


def test_flips_double_and_half_of_all_ways_are_mirrored() -> None:
    two = looks(SIZE, TARGET, Subset(flip_aug=True), "x")
    assert [one.flipped for one in two] == [False, True]
    how = Subset(flip_aug=True, random_crop=True, image_variants=8)
    eight = looks(SIZE, TARGET, how, "x")
    assert sum(one.flipped for one in eight) == 4
    assert len({one.corner for one in eight}) > 4
    assert eight == looks(SIZE, TARGET, how, "x")
    assert eight != looks(SIZE, TARGET, how, "another picture")


def test_a_picture_of_its_bucket_s_shape_has_no_other_crop() -> None:
    assert len(looks((64, 64), TARGET, Subset(random_crop=True), "x")) == 1


def test_size_ids_find_the_crop_again_in_the_picture_and_in_its_mirror() -> None:
    # every pixel tells its own column; the ids must lead back to it, mirrored or not
    columns = np.tile(np.arange(128, dtype=np.uint8), (64, 1))
    picture = Image.fromarray(np.stack([columns] * 3, -1))
    how = Subset(flip_aug=True, random_crop=True, image_variants=6)
    for one in looks((128, 64), TARGET, how, "p"):
        shown = np.asarray(apply(picture, one))[0, :, 0].astype(int)
        height, width, top, left, target_height, target_width = one.ids
        assert (height, width, top, target_height, target_width) == (64, 128, 0, 64, 64)
        whole = columns[0, ::-1] if one.flipped else columns[0]
        assert shown.tolist() == whole[left : left + 64].tolist()


def test_colours_change_a_little_and_without_bound_breaking() -> None:
    picture = Image.effect_noise((64, 64), 80).convert("RGB")
    many = looks((64, 64), TARGET, Subset(color_aug=True, image_variants=5), "p")
    assert len({one.colour for one in many}) == 5
    before = np.asarray(picture).astype(int)
    for one in many:
        off = np.abs(np.asarray(apply(picture, one)).astype(int) - before).mean()
        assert 0 < off < 20
    white = Image.new("RGB", (64, 64), "white")
    assert np.asarray(apply(white, many[0])).min() >= 250


@pytest.fixture
def masked(tmp_path: Path) -> Example:
    pixels = np.zeros((80, 160, 4), np.uint8)
    pixels[..., :3] = 200
    pixels[:, :96, 3] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return Example(tmp_path, "a.png", "", size=(160, 80), how=Subset(alpha_mask=True))


def test_an_alpha_mask_is_cropped_and_mirrored_like_its_picture(masked: Example) -> None:
    plain = fit((160, 80), (64, 64), at=(0.0, 0.5))  # scaled to 128 x 64: opaque up to 77
    assert mask_of(masked, plain, 8).shape == (1, 8, 8)
    assert mask_of(masked, plain, 8).min() == 1
    right = fit((160, 80), (64, 64), at=(1.0, 0.5))  # columns 64 to 128: opaque up to 13
    row = mask_of(masked, right, 8)[0, 4]
    assert row[0] == 1
    assert 0.5 < row[1] < 0.7
    assert not row[2:].any()
    mirrored = mask_of(masked, replace(right, flipped=True), 8)[0, 4]
    assert mirrored.tolist() == pytest.approx(row.flip(0).tolist(), abs=1e-5)


def test_mask_files_multiply_and_are_refused_by_name(masked: Example, tmp_path: Path) -> None:
    grey = tmp_path / "mask.png"
    Image.new("L", (320, 160), 128).save(grey)  # another resolution, the same shape
    both = replace(masked, mask=grey)
    found = mask_of(both, fit((160, 80), (64, 64), at=(0.0, 0.5)), 8)
    assert found.mean().item() == pytest.approx(128 / 255, abs=1e-3)
    Image.new("L", (80, 160), 255).save(grey)
    with pytest.raises(Refused, match=r"mask\.png: is 80x160 and its picture 160x80"):
        mask_of(both, fit((160, 80), TARGET), 8)
    Image.new("L", (160, 80), 0).save(grey)
    with pytest.raises(Refused, match="mask is empty"):
        mask_of(both, fit((160, 80), TARGET), 8)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        (Sizes((1024, 1024), bucket_reso_steps=60), "multiple of 8"),
        (Sizes((512, 512), min_bucket_reso=600, max_bucket_reso=500), "contradict"),
        (Sizes((512, 512), min_bucket_reso=2000, max_bucket_reso=2048), "No bucket"),
        (Sizes((512, 500), enable_bucket=False), "multiple of the bucket step"),
        (Sizes((512, 512), bucket_reso_steps=4096), "contradict"),
    ],
)
def test_absurd_buckets_are_refused(sizes: Sizes, said: str) -> None:
    with pytest.raises(Refused, match=said):
        sizes.table(1024)


def test_s3_s_buckets_and_a_fixed_oblong() -> None:
    table = Sizes((1024, 1024), True, 256, 2048, 32).table(512)
    assert (1024, 1024) in table.sizes
    assert (512, 2048) in table.sizes
    assert all(side % 32 == 0 for size in table.sizes for side in size)
    assert Sizes((768, 512), enable_bucket=False).table(1024).sizes == ((768, 512),)
    assert Sizes().table(64).sizes == ((64, 64),)
