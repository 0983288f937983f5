"""Pictures of every awkward kind: handled as stated, or refused by name."""

import contextlib
import io
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from recast.data.images import header, load, to_tensor
from recast.errors import Refused


def pixel(picture: Image.Image, x: int = 0, y: int = 0) -> tuple[int, ...]:
    value = picture.getpixel((x, y))
    assert isinstance(value, tuple)
    return value


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    picture = Image.new("RGB", (40, 20), (255, 0, 0))
    picture.paste((0, 0, 255), (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    for suffix in ("jpg", "png", "webp"):
        path = tmp_path / f"a.{suffix}"
        picture.save(path, exif=exif, **({"quality": 95} if suffix != "png" else {}))
        assert header(path).size == (20, 40)
        upright = load(path)
        assert upright.size == (20, 40)
        assert pixel(upright, 10, 5)[2] > 200
        assert pixel(upright, 10, 35)[0] > 200


def test_alpha_is_composed_onto_the_stated_colour(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(path)
    assert pixel(load(path)) == (255, 255, 255)
    assert pixel(load(path, background=(1, 2, 3))) == (1, 2, 3)
    assert "transparent" in header(path).notes[0]


def test_transparent_palette_and_grey_alpha(tmp_path: Path) -> None:
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 200, 10, 20])
    palette.save(tmp_path / "p.png", transparency=1)
    assert pixel(load(tmp_path / "p.png")) == (255, 255, 255)
    palette.save(tmp_path / "q.png")
    assert pixel(load(tmp_path / "q.png")) == (200, 10, 20)
    Image.new("LA", (8, 8), (90, 0)).save(tmp_path / "la.png")
    assert pixel(load(tmp_path / "la.png"), 1, 1) == (255, 255, 255)


def test_16_bit_grey_is_scaled(tmp_path: Path) -> None:
    values = np.full((8, 8), 60000, dtype=np.uint16)
    values[0, 0] = 0
    for suffix in ("png", "tif"):
        path = tmp_path / f"a.{suffix}"
        Image.fromarray(values).save(path)
        picture = load(path)
        assert pixel(picture, 4, 4) == (233, 233, 233)
        assert pixel(picture, 0, 0) == (0, 0, 0)
    assert "16-bit" in header(path).notes[0]


def test_float_pixels_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(path)
    with pytest.raises(Refused, match="floating-point"):
        load(path)


def test_cmyk_is_converted(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(path, quality=95)
    red, green, blue = pixel(load(path), 8, 8)
    assert red > 240
    assert max(green, blue) < 15


def test_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "lime", "blue")]
    for suffix in ("gif", "webp", "png"):
        path = tmp_path / f"a.{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:])
        assert pixel(load(path))[0] > 240
        assert "first of 3 frames" in header(path).notes[0]


def png_header(width: int, height: int) -> bytes:
    """Return a PNG that claims a size and has no pixels."""

    def part(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + part(b"IHDR", size)
        + part(b"IDAT", zlib.compress(b""))
        + part(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [8_100, 10_000, 20_000, 60_000])
def test_more_than_64_megapixels_are_refused_before_decoding(tmp_path: Path, side: int) -> None:
    path = tmp_path / "huge.png"
    path.write_bytes(png_header(side, side))
    for read in (header, load):
        with pytest.raises(Refused, match=r"huge\.png.*megapixels"):
            read(path)


def test_broken_files_are_named_with_the_reason(tmp_path: Path) -> None:
    body = io.BytesIO()
    Image.effect_noise((64, 64), 60).convert("RGB").save(body, "JPEG")
    cases = {
        "empty.png": (b"", "empty"),
        "page.jpg": (b"<!DOCTYPE html><html>", "web page"),
        "cut.jpg": (body.getvalue()[:700], "broken"),
        "noise.png": (b"\x00" * 100, "broken"),
    }
    for name, (raw, word) in cases.items():
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(Refused, match=f"{name}.*{word}"):
            load(tmp_path / name)
    with pytest.raises(Refused, match="absent"):
        load(tmp_path / "absent.png")


def test_mutated_pictures_load_or_are_refused(tmp_path: Path) -> None:
    rng = random.Random(1)
    sources = []
    for kind in ("PNG", "JPEG", "WEBP", "GIF"):
        body = io.BytesIO()
        Image.effect_noise((24, 24), 60).convert("RGB").save(body, kind)
        sources.append((kind.lower(), body.getvalue()))
    for trial in range(400):
        kind, raw = sources[trial % len(sources)]
        changed = bytearray(raw)
        for _ in range(rng.randint(1, 8)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        if rng.random() < 0.3:
            del changed[rng.randrange(len(changed)) :]
        path = tmp_path / f"m.{kind}"
        path.write_bytes(bytes(changed))
        for read in (header, load):
            with contextlib.suppress(Refused):
                read(path)


def test_tensor_range_and_order() -> None:
    picture = Image.new("RGB", (4, 2), (255, 0, 127))
    tensor = to_tensor(picture)
    assert tensor.shape == (3, 2, 4)
    assert tensor.dtype == torch.float32
    assert tensor[:, 0, 0].tolist() == pytest.approx([1.0, -1.0, 127 / 127.5 - 1])
