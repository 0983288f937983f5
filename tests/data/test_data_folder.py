"""What a scan finds in a folder, and what it refuses."""

from pathlib import Path

import pytest
from PIL import Image

from recast.data.folder import scan
from recast.errors import Refused


def picture(path: Path, size: tuple[int, int] = (8, 6)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path)
    return path


def test_captions_beside_pictures(tmp_path: Path) -> None:
    for name in ("b.png", "a.jpg", "c.webp", "d.PNG"):
        picture(tmp_path / name)
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa cat,\r\n  on a mat \n")
    (tmp_path / "b.caption").write_text("ein Bär", encoding="utf-8")
    (tmp_path / "c.txt").write_text("")
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / ".hidden.png").write_bytes(b"")
    found = scan(tmp_path)
    assert [(e.name, e.caption) for e in found.examples] == [
        ("a.jpg", "a cat, on a mat"),
        ("b.png", "ein Bär"),
        ("c.webp", ""),
        ("d.PNG", ""),
    ]
    assert found.uncaptioned == 2
    assert found.examples[0].size == (8, 6)
    assert found.problems == ()


def test_stems_with_dots(tmp_path: Path) -> None:
    picture(tmp_path / "v1.5.png")
    (tmp_path / "v1.5.txt").write_text("yes")
    (tmp_path / "v1.txt").write_text("no")
    assert scan(tmp_path).examples[0].caption == "yes"


@pytest.mark.parametrize(
    ("files", "word"),
    [
        ({"a.txt": b"x", "a.caption": b"y"}, "two captions"),
        ({"a.txt": b"caf\xe9"}, r"a\.txt: is not UTF-8 \(byte 3\)"),
        ({"a.txt": "x".encode("utf-16")}, "UTF-8"),
        ({"b.png": b""}, r"b\.png: the file is empty"),
        ({"b.jpg": b"<html>"}, "web page"),
    ],
)
def test_problems_are_refused_or_skipped(tmp_path: Path, files: dict, word: str) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "good.png")
    for name, raw in files.items():
        (tmp_path / name).write_bytes(raw)
    with pytest.raises(Refused, match=word):
        scan(tmp_path)
    found = scan(tmp_path, on_broken="skip")
    assert len(found.problems) == 1
    assert "good.png" in [e.name for e in found.examples]


def test_two_pictures_with_one_caption(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "a.jpg")
    assert len(scan(tmp_path).examples) == 2
    (tmp_path / "a.txt").write_text("which?")
    with pytest.raises(Refused, match="shares its caption"):
        scan(tmp_path)


def test_empty_and_missing_folders(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="holds no images"):
        scan(tmp_path)
    with pytest.raises(Refused, match="no such folder"):
        scan(tmp_path / "absent")
    picture(tmp_path / "deep" / "a.png")
    with pytest.raises(Refused, match="recursively"):
        scan(tmp_path)
    assert scan(tmp_path, recursive=True).examples[0].name == "deep/a.png"


def test_skipping_everything_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(Refused, match="empty"):
        scan(tmp_path, on_broken="skip")


def test_kohya_repeats(tmp_path: Path) -> None:
    picture(tmp_path / "10_sks dog" / "a.png")
    picture(tmp_path / "3_" / "b.png")
    picture(tmp_path / "0_off" / "c.png")
    picture(tmp_path / "other" / "d.png")
    (tmp_path / "3_" / "b.txt").write_text("b!")
    found = scan(tmp_path).examples
    assert {(e.name, e.repeats, e.caption) for e in found} == {
        ("10_sks dog/a.png", 10, "sks dog"),
        ("3_/b.png", 3, "b!"),
    }


def test_links_out_of_the_folder(tmp_path: Path) -> None:
    inside, outside = tmp_path / "set", tmp_path / "secret"
    picture(outside / "x.png")
    (outside / "x.txt").write_text("secret")
    picture(inside / "a.png")
    (inside / "b.png").symlink_to(inside / "a.png")
    assert len(scan(inside).examples) == 2
    (inside / "a.txt").symlink_to(outside / "x.txt")
    with pytest.raises(Refused, match=r"a\.txt: this link leads out"):
        scan(inside)
    (inside / "a.txt").unlink()
    (inside / "c.png").symlink_to(outside / "x.png")
    with pytest.raises(Refused, match=r"c\.png: this link leads out"):
        scan(inside)
    (inside / "sub").symlink_to(outside)
    assert len(scan(inside, recursive=True, on_broken="skip").examples) == 2


def test_many_problems_are_counted(tmp_path: Path) -> None:
    for n in range(7):
        (tmp_path / f"{n}.png").write_bytes(b"")
    with pytest.raises(Refused, match=r"0\.png.*1\.png.*2\.png.*and 4 more"):
        scan(tmp_path)
