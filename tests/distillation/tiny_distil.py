"""A distillation so small that it takes a second: config files, and a run of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recast.distillation import Job, run
from recast.distillation.config import Config, load
from recast.events import Note

SMALL = {
    "run": {"steps": 4, "batch": 2},
    "data": {"pictures": 4, "dream_steps": 2, "level": 2},
    "optimizer": {"lr": 1e-3},
    "blocks": {"gradients_every": 2},
    "times": {"toward": "noise", "profile": 24, "bins": 4},
    "save": {"every": 2, "keep": 2},
}


def config(home: Path, out: Path, **sections: dict[str, Any]) -> Config:
    """The small config with other values over it, read from a file as a user's is."""
    values = {
        name: {**SMALL.get(name, {}), **sections.get(name, {})} for name in {*SMALL, *sections}
    }
    values["run"] |= {"model": str(home / "sd15.safetensors"), "out": str(out)}
    path = out.with_suffix(".toml")
    lines = [
        f"[{name}]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in each.items())
        for name, each in values.items()
    ]
    path.write_text("\n".join(lines))
    return load(path)


def do(how: Config, stopped: Callable[[], int] = lambda: 0, force: bool = False) -> list[str]:
    """Run it; returns the sentences it said."""
    job = Job(how, Path(how.run.model), "cpu", force)
    return [event.text for event in run(job, stopped) if isinstance(event, Note)]


def rows(out: Path) -> list[dict[str, Any]]:
    """The log without what a clock says."""
    found = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in found]
