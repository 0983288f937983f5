"""Figures of the data pipeline, on this machine, in this run.

    scan     a folder of 100,000 files (50,000 pictures, 50,000 captions): headers and captions
    make     encoding pictures of 64 x 64 and their captions into the cache, by pocket-xl
    read     images/s of batches from that cache, one worker, plain and with four variants of each
    wait     the share of a training run's time that is spent getting its draws

Run: python bench/data.py [--files 100000] [--images 256] [--steps 40] [--json FILE]
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import torch

from recast import pocket
from recast.data.cache import Store
from recast.data.dataset import Dataset, cache_bytes, prepare
from recast.data.folder import scan
from recast.data.subset import PLAIN, Subset
from recast.model import open_model

BATCH = 16
VARIED = Subset(
    shuffle_caption=True, caption_variants=4, flip_aug=True, random_crop=True, image_variants=4
)


def clocks() -> tuple[float, float]:
    """(seconds of wall clock, seconds of this process's CPU)."""
    return time.perf_counter(), time.process_time()


def since(start: tuple[float, float]) -> dict[str, float]:
    """Seconds passed since `start`."""
    wall, cpu = clocks()
    return {"wall_s": round(wall - start[0], 3), "cpu_s": round(cpu - start[1], 3)}


def pictures(folder: Path, count: int) -> None:
    """Write `count` files: pictures of 64 x 64 in eight kinds, each with its caption."""
    from PIL import Image

    bodies = []
    for k in range(8):
        buffer = io.BytesIO()
        Image.effect_noise((72 + 8 * (k % 3), 72), 60).convert("RGB").save(buffer, "PNG")
        bodies.append(buffer.getvalue())
    folder.mkdir(parents=True)
    for k in range(count // 2):
        # a comment behind the picture's end makes every file another one
        (folder / f"{k:06}.png").write_bytes(bodies[k % 8] + k.to_bytes(4, "big"))
        (folder / f"{k:06}.txt").write_text(f"picture {k % 50}, red, blue, in snow")


def scanning(home: Path, files: int) -> dict[str, Any]:
    """Time the scan of a folder, the second time with warm file system caches."""
    folder = home / "many"
    pictures(folder, files)
    rows = []
    for _ in range(2):
        start = clocks()
        found = scan(folder)
        rows.append(since(start))
    assert len(found.examples) == files // 2
    return {"files": files, "first": rows[0], "second": rows[1]}


def reading(home: Path, images: int) -> dict[str, Any]:
    """Time making a cache and drawing batches from it."""
    folder = home / "few"
    pictures(folder, 2 * images)
    model = open_model(pocket.path("pocket-xl"), parts=("te1", "te2", "vae"))
    rows: dict[str, Any] = {"images": images, "batch": BATCH}
    for name, how in (("plain", PLAIN), ("varied", VARIED)):
        found = scan(folder, how=how)
        store = Store(home / f"cache-{name}", model)
        store.text("")
        told = cache_bytes(found, store)
        start = clocks()
        data = Dataset.of(store, prepare(found, store))
        made = since(start)
        real = sum(path.stat().st_size for path in store.root.rglob("*.safetensors"))
        steps = max(4, 1024 // BATCH)
        start = clocks()
        for step in range(steps):
            data.batch(step, 0, BATCH, dropout=0.1)
        took = since(start)
        rows[name] = {
            "made": made, "bytes": real, "predicted_bytes": told, "read": took,
            "images_per_s": round(steps * BATCH / took["wall_s"], 1),
            "images_per_cpu_s": round(steps * BATCH / took["cpu_s"], 1),
        }  # fmt: skip
    return rows


def waiting(home: Path, images: int, steps: int) -> dict[str, Any]:
    """Time a pocket run of the recipe train, and how much of that its draws took."""
    from recast.convert import Job, run, training
    from recast.recipe import load, override

    folder = home / "few"
    if not folder.exists():
        pictures(folder, 2 * images)
    spent: list[float] = []
    plain = training.checked

    def timed(draws: Any, *rest: Any) -> Iterator[Any]:
        source = plain(draws, *rest)
        while True:
            start = time.perf_counter()
            try:
                draw = next(source)
            except StopIteration:
                return
            spent.append(time.perf_counter() - start)
            yield draw

    recipe = override(load("train"), steps=steps, batch=BATCH, rank=8, checkpoint_every=10**6)
    recipe = override(recipe, watch={"validate_every": 0})
    job = Job(pocket.path("pocket-xl"), home / "run", recipe, images=folder, measure=False)
    training.checked = timed  # type: ignore[assignment]
    begun = None
    took = 0.0
    try:
        for event in run(job):
            name = getattr(event, "name", None)
            if name == "train":
                begun = time.perf_counter()
            elif name == "write" and begun:
                took = time.perf_counter() - begun
    finally:
        training.checked = plain
    wait = sum(spent)
    return {
        "steps": steps, "batch": BATCH, "train_s": round(took, 3), "waited_s": round(wait, 3),
        "share": round(wait / took, 4), "ms_a_batch": round(1000 * wait / len(spent), 3),
    }  # fmt: skip


def main() -> None:
    """Measure and print; with --json also write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        rows = {
            "load": os.getloadavg()[0],
            "scan": scanning(home, options.files),
            "read": reading(home, options.images),
            "wait": waiting(home, options.images, options.steps),
        }
    text = json.dumps(rows, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
