"""Dataset files, metadata and policies: what they say is what is read, all else is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from recast.data import dataset_file
from recast.data.folder import Example
from recast.data.gather import gather
from recast.data.subset import PLAIN, Subset, from_recipe
from recast.errors import Refused
from recast.recipe import load, override


def pictures(folder: Path, *names: str, caption: str | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (40, 30), (len(name) * 9 % 256, 80, 60)).save(folder / name)
        if caption is not None:
            (folder / name).with_suffix(".txt").write_text(caption)
    return folder


def written(folder: Path, text: str) -> Path:
    path = folder / "set.toml"
    path.write_text(text)
    return path


WHOLE = """
[general]
shuffle_caption = true
caption_extension = "txt"
keep_tokens = 1

[[datasets]]
resolution = 1024
batch_size = 8
enable_bucket = true
min_bucket_reso = 256
max_bucket_reso = 2048
bucket_reso_steps = 32
flip_aug = true

  [[datasets.subsets]]
  image_dir = "cats"
  num_repeats = 5
  class_tokens = "cat"
  keep_tokens = 2
  caption_dropout_rate = 0.5
  flip_aug = false

  [[datasets.subsets]]
  image_dir = "dogs"
  loss_weight = 0.25

[[datasets]]
resolution = [768, 512]
  [[datasets.subsets]]
  image_dir = "reg"
  is_reg = true
"""


def test_a_setting_comes_from_the_nearest_table(tmp_path: Path) -> None:
    for name in ("cats", "dogs", "reg"):
        (tmp_path / name).mkdir()
    below = Subset(caption_tag_dropout_rate=0.1, keep_tokens=9)
    found = dataset_file.read(written(tmp_path, WHOLE), below, prior=0.5)
    cats, dogs, reg = found.subsets
    assert found.batch == 8
    assert (cats.keep_tokens, dogs.keep_tokens, reg.keep_tokens) == (2, 1, 1)
    assert (cats.flip_aug, dogs.flip_aug, reg.flip_aug) == (False, True, False)
    assert cats.num_repeats == 5
    assert cats.caption_dropout_rate == 0.5
    assert dogs.caption_dropout_rate is None
    assert {one.caption_extension for one in found.subsets} == {".txt"}
    assert {one.caption_tag_dropout_rate for one in found.subsets} == {0.1}
    assert [one.loss_weight for one in found.subsets] == [1.0, 0.25, 0.5]
    assert cats.sizes.resolution == (1024, 1024)
    assert (cats.sizes.bucket_reso_steps, reg.sizes.bucket_reso_steps) == (32, 64)
    assert reg.sizes.resolution == (768, 512)
    assert cats.image_dir == tmp_path / "cats"


DIR = 'image_dir = "cats"'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", r"write \[general\] once"),
        ("[[datasets]]\nresolution=512", "no .*subsets"),
        ("[[datasets]]\n[[datasets.subsets]]\nnum_repeats=1", "names no image_dir"),
        (f"[[datasets]]\n[[datasets.subsets]]\n{DIR}\nflip_augg=true", "nearest is 'flip_aug'"),
        (f"[[datasets]]\n[[datasets.subsets]]\n{DIR}\nflip_aug='yes'", "give true or false"),
        (f"[[datasets]]\n[[datasets.subsets]]\n{DIR}\nnum_repeats=1.5", "give a whole number"),
        (f"[[datasets]]\n[[datasets.subsets]]\n{DIR}\ncaption_dropout_rate=3", "from 0 to 1"),
        (f"[[datasets]]\n[[datasets.subsets]]\n{DIR}\nresolution=512", "belongs to a dataset"),
        (f"[general]\nis_reg=true\n[[datasets]]\n[[datasets.subsets]]\n{DIR}", "one folder"),
        (
            f"[[datasets]]\n[[datasets.subsets]]\n{DIR}\nface_crop_aug_range='1,2'",
            "cannot be honoured",
        ),
        (
            f"[[datasets]]\nbatch_size=2\n[[datasets.subsets]]\n{DIR}\n"
            f"[[datasets]]\nbatch_size=4\n[[datasets.subsets]]\n{DIR}",
            "2 and 4: one run has one",
        ),
        ('[[datasets]]\n[[datasets.subsets]]\nimage_dir = "C:\\cats"', "single quotes"),
        (f"[[datasets]]\n[[datasets.subsets]]\n{DIR}\non_missing_caption='x'", "one of empty"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_place(tmp_path: Path, text: str, said: str) -> None:
    pictures(tmp_path / "cats", "a.png")
    with pytest.raises(Refused, match=said) as error:
        gather(written(tmp_path, text))
    assert "set.toml" in str(error.value)
    assert "\n" not in str(error.value)


def test_keys_without_effect_are_told_and_neutral_ones_pass(tmp_path: Path) -> None:
    pictures(tmp_path / "cats", "a.png")
    text = f"[[datasets]]\nnetwork_multiplier=1.0\n[[datasets.subsets]]\n{DIR}\ncache_info=true"
    found = dataset_file.read(written(tmp_path, text))
    assert len(found.remarks) == 1
    assert "cache_info has no effect" in found.remarks[0]


def test_several_folders_become_one_source(tmp_path: Path) -> None:
    pictures(tmp_path / "cats", "a.png", "b.png")
    pictures(tmp_path / "dogs", "c.png", caption="a dog")
    pictures(tmp_path / "reg", "r.png", "s.png", "t.png")
    found = gather(written(tmp_path, WHOLE))
    by_name = {example.name: example for example in found.examples}
    assert [by_name[n].repeats for n in ("a.png", "b.png", "c.png")] == [5, 5, 1]
    assert by_name["a.png"].caption == "cat"
    assert by_name["c.png"].caption == "a dog"
    # eleven samples to learn from: three for regularisation are repeated to eleven
    assert sum(e.repeats for e in found.examples if e.how.is_reg) == 11
    assert sorted(e.repeats for e in found.examples if e.how.is_reg) == [3, 4, 4]


def test_of_many_regularisation_pictures_only_as_many_as_needed_are_taken(tmp_path: Path) -> None:
    pictures(tmp_path / "cats", "a.png")
    pictures(tmp_path / "reg", *(f"{k}.png" for k in range(9)))
    text = (
        f"[[datasets]]\n[[datasets.subsets]]\n{DIR}\nnum_repeats=4\n"
        "[[datasets.subsets]]\nimage_dir='reg'\nis_reg=true"
    )
    found = gather(written(tmp_path, text))
    assert [e.name for e in found.examples] == ["a.png", "0.png", "1.png", "2.png", "3.png"]
    only = "[[datasets]]\n[[datasets.subsets]]\nimage_dir='reg'\nis_reg=true"
    with pytest.raises(Refused, match="All folders are for regularisation"):
        gather(written(tmp_path, only))


def test_a_broken_picture_of_one_folder_is_named_or_left_out(tmp_path: Path) -> None:
    pictures(tmp_path / "cats", "a.png")
    (tmp_path / "cats" / "b.png").write_bytes(b"")
    path = written(tmp_path, f"[[datasets]]\n[[datasets.subsets]]\n{DIR}")
    with pytest.raises(Refused, match=r"b\.png: the file is empty"):
        gather(path)
    found = gather(path, on_broken="skip")
    assert [len(found.examples), len(found.problems)] == [1, 1]


@pytest.mark.parametrize("policy", ["empty", "skip", "refuse"])
def test_captions_missing(tmp_path: Path, policy: str) -> None:
    folder = pictures(tmp_path / "cats", "a.png")
    pictures(folder, "b.png", caption="b")
    pictures(folder, "empty.png", caption="")
    how = from_recipe(override(load(), images={"on_missing_caption": policy}).images)
    if policy == "refuse":
        with pytest.raises(Refused, match=r"a\.png: has no caption; write one"):
            gather(folder, how)
        return
    names = [e.name for e in gather(folder, how).examples]
    assert names == (["a.png", "b.png", "empty.png"] if policy == "empty" else names[:2])
    assert "empty.png" in names


def kohya(found: tuple[Example, ...]) -> dict[str, str]:
    return {e.name: e.caption for e in found}


def test_kohya_s_metadata(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "cats", "a.png", "b.png", "c.png", "d.png")
    table = {
        "a": {"caption": "a cat", "tags": "cat, grass"},
        str(folder / "b.png"): {"tags": "cat"},
        "D:\\old machine\\c.png": {"caption": "c"},
    }
    meta = folder / "meta.json"
    meta.write_text(json.dumps(table))
    found = gather(meta)
    assert kohya(found.examples) == {"a.png": "a cat, cat, grass", "b.png": "cat", "c.png": "c"}
    assert [p.wanted for p in found.problems] == [True]
    assert "d.png: is not named" in found.problems[0].what
    text = f"[[datasets]]\n[[datasets.subsets]]\n{DIR}\nmetadata_file='cats/meta.json'"
    assert kohya(gather(written(tmp_path, text)).examples) == kohya(found.examples)
    (folder / "a.txt").write_text("beside")
    (folder / "d.txt").write_text("its own")
    assert kohya(gather(meta).examples) == {**kohya(found.examples), "d.png": "its own"}


def test_hugging_face_s_metadata_lies_in_the_folder(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "cats", "a.png", "b.png")
    lines = [{"file_name": "a.png", "text": "first"}, {"file_name": "b.png", "text": "x\ny"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert kohya(gather(folder).examples) == {"a.png": "first", "b.png": "x y"}
    (folder / "a.txt").write_text("other")
    with pytest.raises(Refused, match=r"a\.txt and one in the metadata; keep one"):
        gather(folder)
    (folder / "a.txt").unlink()
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text('file_name,text\na.png,"one, two"\n')
    assert kohya(gather(folder).examples) == {"a.png": "one, two", "b.png": ""}


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("m.json", "[]", "should be a table"),
        ("m.json", "{", "is no JSON"),
        ("m.json", '{"a": 3}', "a should hold a table"),
        ("m.json", '{"a": {"caption": 3}}', "a has a caption of 3"),
        ("m.jsonl", '{"text": "x"}', "line 1: should be a table with a"),
        ("m.jsonl", '{"file_name":"a","text":"x"}\n{"file_name":"a","text":"y"}', "two captions"),
        ("m.jsonl", '{"file_name":"a","text":["x"]}', "give text"),
    ],
)
def test_broken_metadata_is_refused(tmp_path: Path, name: str, text: str, said: str) -> None:
    pictures(tmp_path, "a.png")
    (tmp_path / name).write_text(text)
    with pytest.raises(Refused, match=said):
        gather(tmp_path / name)


def test_masks_are_found_by_name_and_missed_by_name(tmp_path: Path) -> None:
    pictures(tmp_path / "cats", "a.png", "b.png")
    pictures(tmp_path / "masks", "a.jpg")
    text = f"[[datasets]]\n[[datasets.subsets]]\n{DIR}\nconditioning_data_dir='masks'"
    with pytest.raises(Refused, match=r"b\.png: has no mask in"):
        gather(written(tmp_path, text))
    pictures(tmp_path / "masks", "b.png")
    masks = [e.mask and e.mask.name for e in gather(written(tmp_path, text)).examples]
    assert masks == ["a.jpg", "b.png"]


def test_wildcard_lines_are_kept_and_joined_otherwise(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "cats", "a.png", caption="one  way\n\nanother")
    assert gather(folder).examples[0].caption == "one way another"
    lines = gather(folder, Subset(enable_wildcard=True)).examples[0].caption
    assert lines == "one way\nanother"


def test_every_recipe_that_says_nothing_of_images_leaves_a_plain_folder_plain() -> None:
    assert from_recipe(load().images) == PLAIN
    assert from_recipe(load("train").images) == PLAIN
