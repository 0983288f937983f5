"""Runs that take seconds: tiny checkpoints with the whole vocabulary, few steps, few pictures."""

from __future__ import annotations

import re
from pathlib import Path

from tests import tiny

from recast.convert import Job, run
from recast.recipe import Recipe, load, override

SIZE = 64
PROMPTS = ("a red kite over dunes", "two boats at noon", "an old lamp")
NAMES = ("model.safetensors", "patch.safetensors", "adapter.safetensors")


def checkpoint(
    folder: Path, family: str, *, name: str = "", dtype: str = "F16", **extra: str
) -> Path:
    """A tiny checkpoint of pictures of 64 pixels that takes any prompt."""
    path = folder / f"{name or family}.safetensors"
    return tiny.checkpoint(
        path, family, dtype="F16", vocabulary=49408, metadata={"recast.size": str(SIZE), **extra}
    )


def images(folder: Path, count: int = 3) -> Path:
    """A folder of pictures with captions; the same bytes every time."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        picture = Image.new("RGB", (80, 72), (40 * k % 256, 90, 200 - 30 * k % 200))
        picture.paste((255, 255, 0), (8 * k, 8, 8 * k + 24, 40))
        picture.save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text(PROMPTS[k % len(PROMPTS)], encoding="utf-8")
    return folder


def prompts(folder: Path) -> Path:
    """A prompts file."""
    path = folder / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    return path


def recipe(folder: Path, objective: str = "flow", base: str = "default", **train: object) -> Recipe:
    """The shortest run of a recipe; `train` changes single keys of its training section."""
    file = str(prompts(folder))
    how = {"steps": 3, "batch": 2, "checkpoint_every": 1, **train}
    return override(
        load(base),
        target={"objective": objective},
        train=how,
        data={"pictures": 2, "replay_steps": 3, "prompts": file},
        evaluate={"pictures": 3, "steps": 2, "batch": 3, "prompts": file, "bins": 3},
    )


def convert(job: Job) -> None:
    """Run a job to its end."""
    for _ in run(job):
        pass


def contents(folder: Path, names: tuple[str, ...] = NAMES) -> dict[str, bytes]:
    """The bytes of a run's files; of its log without what the machine did, which varies."""
    return {
        name: unpaced(folder / name) if name == "log.jsonl" else (folder / name).read_bytes()
        for name in names
    }


def unpaced(path: Path) -> bytes:
    """A log without its `pace`, every other byte as it is."""
    return re.sub(rb', "pace": \{[^}]*\}', b"", path.read_bytes())
