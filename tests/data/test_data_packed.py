"""Shards and tables read through their libraries: the same pictures and captions as the folder."""

from __future__ import annotations

import builtins
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.data.fake import Fake

from recast.data.cache import Store
from recast.data.dataset import Dataset, prepare
from recast.data.gather import gather
from recast.data.images import load
from recast.data.subset import Subset
from recast.errors import Refused

COLOURS = {"0": (200, 10, 10), "1": (10, 200, 10), "2": (10, 10, 200)}


def png(colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 36), colour).save(buffer, "PNG")
    return buffer.getvalue()


def shard(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, raw in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    return path


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    first = {"0.png": png(COLOURS["0"]), "0.txt": b"red one", "1.png": png(COLOURS["1"])}
    shard(folder / "a-000.tar", first)
    second = {"2.png": png(COLOURS["2"]), "2.json": json.dumps({"caption": "blue\none"}).encode()}
    shard(folder / "a-001.tar", second)
    return folder


def test_shards(shards: Path, tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    found = gather(shards)
    assert [e.caption for e in found.examples] == ["red one", "", "blue one"]
    assert [e.size for e in found.examples] == [(40, 36)] * 3
    colours = [load(e.path).getpixel((0, 0)) for e in found.examples]
    assert colours == list(COLOURS.values())
    data = Dataset.of(
        store := Store(tmp_path / "cache", Fake()),  # type: ignore[arg-type]
        prepare(found, store),
    )
    got = data.batch(0, 0, 3)
    assert sorted(got.captions) == ["", "blue one", "red one"]
    assert len(gather(shards / "a-000.tar").examples) == 2
    toml = tmp_path / "set.toml"
    toml.write_text(
        "[[datasets]]\n[[datasets.subsets]]\nimage_dir='shards'\nnum_repeats=2\nclass_tokens='x'"
    )
    assert [(e.repeats, e.caption) for e in gather(toml).examples][1] == (2, "x")


def test_what_is_wrong_with_a_shard_is_named(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    bad = {"0.png": b"", "1.png": png(COLOURS["1"]), "1.txt": b"caf\xe9", "2.png": b"<html>"}
    folder = shard(tmp_path / "s" / "a.tar", bad | {"3.png": png(COLOURS["0"])}).parent
    found = gather(folder, on_broken="skip")
    assert len(found.examples) == 1
    said = " ".join(problem.what for problem in found.problems)
    for words in ("a.tar/0.png: the file is empty", "a.tar/1.png: its txt is no UTF-8", "web page"):
        assert words in said
    whole = (folder / "a.tar").read_bytes()
    (folder / "a.tar").write_bytes(whole[:700])
    with pytest.raises(Refused, match=r"a\.tar"):
        gather(folder)


def test_saved_data_sets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {
        "image": [{"bytes": png(colour), "path": None} for colour in COLOURS.values()],
        "text": ["red", "green", None],
    }
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    table = datasets.Dataset.from_dict(rows, features=features)
    table.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": table}).save_to_disk(str(tmp_path / "split"))
    for name in ("saved", "split"):
        found = gather(tmp_path / name, Subset(num_repeats=3))
        assert [e.caption for e in found.examples] == ["red", "green", ""]
        assert {e.repeats for e in found.examples} == {3}
        colours = [load(e.path).getpixel((0, 0)) for e in found.examples]
        assert colours == list(COLOURS.values())
    datasets.Dataset.from_dict({"a": [1]}).save_to_disk(str(tmp_path / "none"))
    with pytest.raises(Refused, match="no column of pictures"):
        gather(tmp_path / "none")
    (tmp_path / "saved" / "state.json").write_text("{")
    with pytest.raises(Refused, match="datasets cannot read it"):
        gather(tmp_path / "saved")


def test_parquet_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the Hub keeps them: pieces of a split in `data`, other splits beside them."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    kinds = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})

    def piece(path: Path, names: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        images = [{"bytes": png(COLOURS[name]), "path": None} for name in names]
        rows = {"image": images, "caption": [f"number {name}" for name in names]}
        datasets.Dataset.from_dict(rows, features=kinds).to_parquet(str(path))

    hub, flat = tmp_path / "hub", tmp_path / "flat"
    piece(hub / "data" / "train-00000-of-00002.parquet", "01")
    piece(hub / "data" / "train-00001-of-00002.parquet", "2")
    piece(hub / "data" / "test-00000-of-00001.parquet", "0")
    piece(flat / "all.parquet", "12")
    for folder, names in ((hub, "012"), (flat, "12")):
        found = gather(folder)
        assert [e.caption for e in found.examples] == [f"number {name}" for name in names]
        assert [load(e.path).getpixel((0, 0)) for e in found.examples] == [
            COLOURS[name] for name in names
        ]
    (flat / "all.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(Refused, match="datasets cannot read it"):
        gather(flat)


@pytest.mark.parametrize("library", ["webdataset", "datasets"])
def test_without_the_library_the_command_that_installs_it_is_told(
    library: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == library:
            raise ImportError(name)
        return real(name, *rest, **more)

    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "dataset_info.json").write_text("{}")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(Refused, match=r"pip install 'recast\[data\]'"):
        gather(shards if library == "webdataset" else tmp_path / "saved")
