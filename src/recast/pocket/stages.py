"""Resumable stages: an artefact's name carries a hash of its settings and of what it was made from.

A stage whose file exists is skipped, so the same command resumes where the last one stopped, and a
changed setting redoes that stage and what follows it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]
Net = TypeVar("Net", bound=torch.nn.Module)


@dataclass(frozen=True)
class Workshop:
    """Where artefacts and the log lie."""

    folder: Path

    def say(self, line: str) -> None:
        """Print a line and append it to the log, with the time of day."""
        text = f"{time.strftime('%H:%M:%S')} {line}"
        print(text, flush=True)
        with (self.folder / "log.txt").open("a", encoding="utf-8") as log:
            log.write(text + "\n")

    def artefact(self, name: str, settings: Any, parents: tuple[Path, ...] = ()) -> Path:
        """Return the file of a stage with these settings (a frozen dataclass) and inputs."""
        made_from = json.dumps(
            [asdict(settings), [parent.name for parent in parents]], sort_keys=True
        )
        return (
            self.folder
            / f"{name}-{hashlib.sha256(made_from.encode()).hexdigest()[:10]}.safetensors"
        )

    def stage(
        self,
        name: str,
        settings: object,
        parents: tuple[Path, ...],
        make: Callable[[], tuple[Tensors, dict[str, str]]],
    ) -> Path:
        """Return the stage's file, running `make` for tensors and figures unless it exists."""
        path = self.artefact(name, settings, parents)
        if path.exists():
            self.say(f"{name}: {path.name} exists")
            return path
        self.say(f"{name}: {settings}")
        start = time.monotonic()
        tensors, figures = make()
        figures = figures | {"minutes": f"{(time.monotonic() - start) / 60:.1f}"}
        partial = path.with_suffix(".partial")
        save_file(
            {key: value.contiguous() for key, value in tensors.items()}, partial, metadata=figures
        )
        partial.rename(path)
        self.say(f"{name}: {path.name} {figures}")
        return path

    def follow(
        self, name: str, losses: Iterator[float], steps: int, every: int = 250
    ) -> Iterator[int]:
        """Run a training loop, logging its mean loss; yields the number of steps done."""
        start, recent = time.monotonic(), []
        for step, loss in enumerate(losses, 1):
            recent.append(loss)
            if step % every == 0 or step == steps:
                mean, minutes = sum(recent) / len(recent), (time.monotonic() - start) / 60
                self.say(f"{name}: step {step}/{steps} loss {mean:.4f} {minutes:.1f} min")
                recent.clear()
            yield step


def load_into(net: Net, path: Path) -> Net:
    """Load an artefact into a module, strictly; returns it."""
    net.load_state_dict(load_file(path))
    return net
