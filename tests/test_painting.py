"""Orders for pictures: names, sizes, what travels in the file."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from PIL import Image

from recast.errors import Refused
from recast.painting import Order, pixels, png, save, slug
from recast.sample.images import Picture


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("A big red star, on dots!", "a-big-red-star-on-dots"),
        ("../../etc/passwd", "etc-passwd"),
        ("", "empty"),
        ("日本", "empty"),
        ("x" * 100, "x" * 48),
        ("nul\0and\nline", "nul-and-line"),
    ],
)
def test_a_prompt_becomes_a_safe_file_name(text: str, name: str) -> None:
    assert slug(text) == name


def test_names_are_numbered_so_that_equal_prompts_do_not_meet(tmp_path: Path) -> None:
    names = [path.name for path in Order(prompts=("a", "a", "b")).paths(tmp_path, force=False)]
    assert names == ["00000-a.png", "00001-a.png", "00002-b.png"]


@pytest.mark.parametrize(
    ("text", "size"),
    [(None, None), ("1024", (1024, 1024)), ("832x1216", (1216, 832)), (" 64X128 ", (128, 64))],
)
def test_sizes(text: str | None, size: tuple[int, int] | None) -> None:
    assert pixels(text) == size


@pytest.mark.parametrize("text", ["", "0", "-8", "100", "64x", "64x100", "64 x 64 px", "1e3"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(Refused, match="--size"):
        pixels(text)


def test_a_png_holds_its_levels_exactly_and_repeats_byte_for_byte() -> None:
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16).repeat(3, 1, 1)
    image = levels.float() / 127.5 - 1
    data = png(image)
    assert data == png(image)
    read = torch.tensor(list(Image.open(io.BytesIO(data)).tobytes()), dtype=torch.uint8)
    assert torch.equal(read.reshape(16, 16, 3).permute(2, 0, 1), levels)


def test_a_picture_carries_its_parameters(tmp_path: Path) -> None:
    picture = Picture(0, "a kite", 7, torch.zeros(3, 8, 8))
    path = tmp_path / "new" / "x.png"
    save(path, picture, Order(negative="fog", steps=9, scale=2.5), force=False)
    told = Image.open(path).text["parameters"]
    assert told.startswith("a kite\nNegative prompt: fog\nSteps: 9, Sampler: euler, CFG scale: 2.5")
    assert "Seed: 7" in told
    with pytest.raises(Refused, match="exists"):
        save(path, picture, Order(), force=False)


def test_an_order_takes_prompts_from_both_places(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("# one\nb --s 3 --w 64 --h 72\n", encoding="utf-8")
    lines = Order(prompts=("a",), file=file).lines()
    assert [(line.text, line.steps, line.size) for line in lines] == [
        ("a", None, None),
        ("b", 3, (72, 64)),
    ]


@pytest.mark.parametrize("line", ["x --ss eulr", "x --w 100", "x --s 0", "x --fs 0"])
def test_a_line_s_own_settings_are_checked_before_anything_is_painted(
    line: str, tmp_path: Path
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text(line, encoding="utf-8")
    with pytest.raises(Refused):
        Order(file=file).lines()
