"""The pipeline's promised pace, in CPU seconds of this process, whatever else the machine does."""

from __future__ import annotations

import io
import time
from pathlib import Path

from PIL import Image
from tests.data.fake import Fake

from recast.data.cache import Store
from recast.data.dataset import Dataset, prepare
from recast.data.folder import scan


def files(folder: Path, count: int) -> Path:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 60).convert("RGB").save(buffer, "PNG")
    folder.mkdir()
    for k in range(count // 2):
        (folder / f"{k}.png").write_bytes(buffer.getvalue() + k.to_bytes(4, "big"))
        (folder / f"{k}.txt").write_text(f"picture {k % 9}")
    return folder


def test_a_scan_of_100_000_files_takes_20_seconds_at_most(tmp_path: Path) -> None:
    folder = files(tmp_path / "a", 1000)
    scan(folder)
    start = time.process_time()
    scan(folder)
    assert 100 * (time.process_time() - start) < 20


def test_200_images_a_second_come_from_the_cache(tmp_path: Path) -> None:
    store = Store(tmp_path / "cache", Fake(size=64))  # type: ignore[arg-type]
    data = Dataset.of(store, prepare(scan(files(tmp_path / "a", 48)), store))
    data.batch(0, 0, 16)
    start = time.process_time()
    for step in range(8):
        data.batch(step, 0, 16)
    assert 8 * 16 / (time.process_time() - start) > 200
