"""`recast data`: everything that is wrong or worth knowing is told, on paper and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.convert import command


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "set" / "3_a cat"
    folder.mkdir(parents=True)
    for k in range(4):
        coarse = np.random.default_rng(k).integers(0, 256, (8, 9, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((180 + 36 * k, 160), Image.Resampling.BOX)
        picture.save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text(
            f"cat, grass, tag {k}" if k else "<script>alert(1)</script>"
        )
    (folder / "copy.png").write_bytes((folder / "1.png").read_bytes())
    with Image.open(folder / "2.png") as second:
        second.save(folder / "2.jpg", quality=95)
    (folder / "2.txt").rename(folder / "2b.txt")
    Image.new("RGB", (90, 90), "red").save(folder / "red.png")
    Image.new("RGB", (90, 90), "blue").save(folder / "blue.png")
    whole = (folder / "3.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "zero.png").write_bytes(b"")
    return tmp_path / "set"


def told(words: list[object], capsys: pytest.CaptureFixture[str], code: int) -> tuple[str, str]:
    capsys.readouterr()
    command.run(words, code)
    out = capsys.readouterr()
    return out.out, out.err


def test_as_json(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = told(["data", source, "--size", "256", "--json"], capsys, 1)
    seen = json.loads(out)
    assert seen["pictures"] == 8
    assert seen["samples"] == 24
    assert [len(seen[name]) for name in ("duplicates", "alike", "same_stem", "problems")] == [
        1, 1, 1, 2,
    ]  # fmt: skip
    assert {Path(p).name for p in seen["duplicates"][0]} == {"1.png", "copy.png"}
    assert {Path(p).name for p in seen["alike"][0]} == {"2.png", "2.jpg"}
    assert {Path(p).name for p in seen["same_stem"][0]} == {"2.png", "2.jpg"}
    assert sum(one["pictures"] for one in seen["buckets"]) == 8
    assert all(one["width"] % 64 == 0 for one in seen["buckets"])
    assert seen["words"]["common"][0] == ["a cat", 5]
    assert "2 of 10 pictures" in err
    fast, _ = told(["data", source, "--size", "256", "--json", "--fast"], capsys, 1)
    assert len(json.loads(fast)["problems"]) == 1


def test_in_words_and_as_sheets(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, picture = tmp_path / "s.html", tmp_path / "s.png"
    out, _ = told(["data", source, "--size", "256", "--sheet", page], capsys, 1)
    for words in ("8 pictures, 24 samples", "the same bytes: 1", "cannot be used: 2", "zero.png"):
        assert words in out
    text = page.read_text()
    assert "<script>" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert text.count("<figure>") == 8
    assert "http" not in text.replace("http-equiv", "")
    told(["data", source, "--size", "256", "--sheet", picture], capsys, 1)
    with Image.open(picture) as sheet:
        assert sheet.width > 1000
    told(["data", source, "--size", "256", "--sheet", picture], capsys, 2)
    told(["data", source, "--sheet", tmp_path / "s.pdf"], capsys, 2)


def test_refusals(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, err = told(["data", tmp_path / "nowhere"], capsys, 2)
    assert "no such folder or file" in err
    _, err = told(["data", source, "--on-missing-caption", "guess"], capsys, 2)
    assert "permitted are" in err
