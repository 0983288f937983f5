"""What a long run tells its caller: loops yield these, and only the command line prints them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """A stage begins: `total` ticks of `unit` will follow; `done` of them exist already."""

    name: str
    total: int
    unit: str = "it"
    done: int = 0


@dataclass(frozen=True)
class Tick:
    """`done` ticks of the current stage are finished; `loss` where the stage has one."""

    done: int
    loss: float | None = None


@dataclass(frozen=True)
class Note:
    """One sentence the user should see."""

    text: str


@dataclass(frozen=True)
class Measured:
    """Figures of the run after `step` steps: drift, PSNR of previews, …"""

    step: int
    figures: Mapping[str, float]


Event = Stage | Tick | Note | Measured


def amount(size: float) -> str:
    """Bytes as 12.3 GB, 4.5 MB, 6.7 kB or 89 bytes."""
    for name, unit in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size:.0f} bytes"
