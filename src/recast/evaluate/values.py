"""Everything a report holds, as frozen values; no torch, so that a report can be read back fast.

Pictures are PNG bytes here. In `report.json` a number that was not measured is null, and the note
beside it says why.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Figure:
    """One figure of the original and of the converted model, from `count` pictures."""

    original: float | None
    converted: float | None
    ratio: float | None = None
    note: str = ""
    count: int = 0


def measured(
    original: float | None, converted: float | None, *, note: str = "", count: int = 0
) -> Figure:
    """A figure with its ratio where there is one; what is not finite becomes None and is said."""
    lost = [
        name for name, value in (("original", original), ("converted", converted)) if _broken(value)
    ]
    if lost:
        note = "; ".join(filter(None, [note, f"not a number: {' and '.join(lost)}"]))
    a = None if _broken(original) else original
    b = None if _broken(converted) else converted
    return Figure(a, b, b / a if a and b is not None else None, note, count)


def unmeasured(reason: str) -> Figure:
    """A figure that could not be had, `unmeasured("no judge for this model")`."""
    return Figure(None, None, None, f"not measured: {reason}")


def _broken(value: float | None) -> bool:
    return value is not None and not math.isfinite(value)


@dataclass(frozen=True)
class Level:
    """One bin of noise levels, `low` <= t < `high`, and the mean squared errors in it.

    `covered` is the share of it that the original's path reaches.
    """

    low: float
    high: float
    against_original: float
    converted: float
    original: float
    covered: float


@dataclass(frozen=True)
class Drift:
    """Mean squared errors of the output over the levels the original covers, and level by level.

    `original` and `converted` are errors against the data, `ratio` their quotient;
    `against_original` is the converted model's distance from the original.
    """

    original: float | None = None
    converted: float | None = None
    ratio: float | None = None
    against_original: float | None = None
    levels: tuple[Level, ...] = ()
    objective: str = ""
    note: str = ""


@dataclass(frozen=True)
class NullLevel:
    """Relative distance of the answers to the empty prompt and to zeroed conditioning."""

    low: float
    high: float
    distance: float


@dataclass(frozen=True)
class Null:
    """The distance between the two null conditions, of the original and the converted model."""

    original: tuple[NullLevel, ...]
    converted: tuple[NullLevel, ...]


@dataclass(frozen=True)
class Previewed:
    """Figures of the previews after `step` steps."""

    step: int
    figures: Mapping[str, float]


@dataclass(frozen=True)
class Course:
    """Validations during training, by step; 0 is the untrained network. `last` is the last step.

    `drift` is from the original, `data` against x0 and eps, None where it was no number.
    """

    steps: tuple[int, ...]
    drift: tuple[float | None, ...]
    data: tuple[float | None, ...]
    last: int
    previews: tuple[Previewed, ...] = ()


@dataclass(frozen=True)
class Identity:
    """The new file under the new and the old sampler, against the original's pictures.

    PSNR in dB from the same noise; `variation_*` are mean total variations; `judged_*` shares of
    pictures that show their prompt, None where no judge exists.
    """

    psnr_new: float
    psnr_old: float
    variation_original: float
    variation_new: float
    variation_old: float
    judged_new: float | None
    judged_old: float | None
    proven: bool


@dataclass(frozen=True)
class Statistics:
    """Means over a set of pictures: for models without a judge, and what a collapse moves."""

    total_variation: float
    colour_entropy: float
    spectrum_slope: float
    brightness: float
    contrast: float
    saturation: float
    sharpness: float = 0.0


@dataclass(frozen=True)
class Losses:
    """Mean loss per noise level and stretch of the run: `values[level][stretch]`, None where empty.

    `steps` are the last steps of the stretches; levels divide [0, 1] evenly.
    """

    steps: tuple[int, ...]
    values: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class Shot:
    """One prompt and seed as PNG bytes; `wrong` is the converted model under the old sampler."""

    caption: str
    seed: int
    original: bytes
    converted: bytes
    wrong: bytes | None = None


@dataclass(frozen=True)
class File:
    """A file of the run and what it is for."""

    name: str
    bytes: int
    use: str


@dataclass(frozen=True)
class Howto:
    """How to use the result in one program: what to do, and code to copy."""

    program: str
    text: str
    code: str = ""


@dataclass(frozen=True)
class Report:
    """A finished conversion; everything the page shows."""

    model: str
    source: str
    target: str
    alignment: Figure
    retention: Figure
    leakage: Figure
    psnr_same_noise_db: Figure
    drift: Drift
    identity: Identity | None = None
    shots: tuple[Shot, ...] = ()
    losses: Losses | None = None
    course: Course | None = None
    null: Null | None = None
    null_shots: tuple[Shot, ...] = ()
    likeness: Mapping[str, float] = field(default_factory=dict)
    judged: Mapping[str, Figure] = field(default_factory=dict)
    statistics: Mapping[str, Statistics] = field(default_factory=dict)
    attributes: Mapping[str, Figure] = field(default_factory=dict)
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    hashes: Mapping[str, str] = field(default_factory=dict)
    timings: Mapping[str, float] = field(default_factory=dict)
    files: tuple[File, ...] = ()
    howto: tuple[Howto, ...] = ()
    notes: tuple[str, ...] = ()
    command: str = ""
    version: str = ""

    def as_json(self) -> dict[str, Any]:
        """What `report.json` holds: plain values, and pictures by their file names."""
        plain = asdict(replace(self, shots=(), null_shots=()))
        for group, start in (("shots", ""), ("null_shots", NULL)):
            plain[group] = [
                {"caption": shot.caption, "seed": shot.seed, **picture_names(k, shot, start)}
                for k, shot in enumerate(getattr(self, group))
            ]
        return plain


NULL = "null-"  # before the file names of pictures without a prompt


def picture_names(k: int, shot: Shot, start: str = "") -> dict[str, str]:
    """File names of a shot's pictures inside the run folder."""
    kinds = [kind for kind in ("original", "converted", "wrong") if getattr(shot, kind) is not None]
    return {kind: f"pictures/{start}{k:02d}-{kind}.png" for kind in kinds}
