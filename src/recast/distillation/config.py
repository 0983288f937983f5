"""The file of a distillation: short strict TOML over a preset, every key a preset's too.

`recipes/distil/default.toml` holds every key but those that only a user can know: the model, the
folder, and which way the times are shifted. `preset` names what lies beneath a file. An unknown key
is refused with the nearest one. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from recast.distillation.folder import BESIDE
from recast.errors import Refused
from recast.recipe.sections import Amount, Count, Line, Names, Positive, Rate, Seed, Share, Whole

MAX_BYTES = 64 * 1024
SHOWN = 3  # problems named in one refusal


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Run(_Section):
    """Which model, where to, how long; `source` "" lets the file say what it predicts."""

    model: Annotated[Line, Field(min_length=1)]
    out: Annotated[Line, Field(min_length=1)]
    source: Line
    steps: Count
    batch: Count
    accumulate: Count
    seed: Seed
    precision: Literal["auto", "fp32", "bf16", "fp16"]


class Data(_Section):
    """Pictures of the user's, or (`images` "") `pictures` that the teacher dreams.

    `prompts`: "grammar" or a file of prompts.
    """

    images: Line
    prompts: Line
    level: Annotated[int, Field(ge=0, le=5)]
    pictures: Count
    dream_steps: Count
    guidance: Amount
    solver: Names
    size: Whole
    caption_dropout: Share


class Student(_Section):
    """full: the profile's layers whole; adapter: a LoRA of rank `dim` in the profile's layers.

    `warm` "clock" fits a full student's time embedding to its new times before the first step.
    """

    kind: Literal["full", "adapter"]
    profile: Names
    dim: Count
    warm: Literal["none", "clock"]


class Target(_Section):
    """What is learned: a row of `losses.AIMS`; `share` is the teacher's where it is mixed."""

    kind: Literal["teacher_v", "data_v", "mix_v", "teacher_rf", "rf", "mix"]
    share: Share
    control: bool


class Optimizer(_Section):
    """AdamW and its cosine; `clip` 0 is off."""

    lr: Positive
    weight_decay: Amount
    betas: Annotated[list[Rate], Field(min_length=2, max_length=2)]
    clip: Amount
    schedule: Literal["constant", "cosine"]
    warmup: Whole


class Blocks(_Section):
    """The block term: its weight, its distance, the assessor ("": base weights) and the fusion."""

    weight: Amount | Literal["auto"]
    auto_warmup: Count
    kd: Literal["pooled", "spatial"]
    kd_weight: Amount
    local_weight: Amount
    where: Literal["pre_resample", "post_block"]
    assessor: Line
    signals: Literal["relative", "literal"]
    low: Positive
    high: Positive
    ema: Rate
    normalise: Literal["sum", "none"]
    every: Count
    gradients_every: Whole


class Times(_Section):
    """Where on the path: see `recast.distill.sampler`; `toward` has no default on purpose."""

    sampler: Literal["uniform", "assessor"]
    toward: Literal["noise", "clean"]
    shift: Positive
    bins: Annotated[int, Field(ge=2, le=1000)]
    profile: Count
    gamma: Amount
    eta: Share
    jitter: Annotated[float, Field(ge=0, le=4)]
    chaos: bool
    importance: bool
    threshold: Share
    worst: Share


class Save(_Section):
    """A checkpoint every so many steps, of which `keep` stay; what a model file holds beside it."""

    every: Count
    keep: Annotated[int, Field(ge=2, le=1000)]
    text: bool
    vae: bool
    upload: Line
    tries: Annotated[int, Field(ge=1, le=100)]


class Evaluate(_Section):
    """Pictures by teacher and student from the same noise at the end; 0 leaves them out."""

    pictures: Whole
    steps: Count
    guidance: Amount
    batch: Count
    seed: Seed


class Config(_Section):
    """A whole distillation."""

    about: Line
    preset: Line
    run: Run
    data: Data
    student: Student
    target: Target
    optimizer: Optimizer
    blocks: Blocks
    times: Times
    save: Save
    evaluate: Evaluate

    def digest(self) -> str:
        """16 hex digits of what the result depends on: all but the folder and what is kept."""
        values = self.model_dump(exclude=set(BESIDE))
        values["run"].pop("out")
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


SECTIONS: dict[str, dict[str, Any]] = {
    "run": dict(Run.model_fields),
    "data": dict(Data.model_fields),
    "student": dict(Student.model_fields),
    "target": dict(Target.model_fields),
    "optimizer": dict(Optimizer.model_fields),
    "blocks": dict(Blocks.model_fields),
    "times": dict(Times.model_fields),
    "save": dict(Save.model_fields),
    "evaluate": dict(Evaluate.model_fields),
}


def presets() -> tuple[str, ...]:
    """Names of the distillations that come along."""
    found = (files("recast") / "recipes" / "distil").iterdir()
    return tuple(sorted(f.name.removesuffix(".toml") for f in found if f.name.endswith(".toml")))


def load(path: Path) -> Config:
    """Read a distillation's file; what it leaves out is as in its preset, and then in `default`.

    Raises Refused for a file that cannot be read, broken TOML, unknown keys and wrong values.
    """
    own = _parse(str(path), _read(path))
    named = own.get("preset", "default")
    if named not in presets():
        near = get_close_matches(str(named), presets(), 1, 0.0)[0]
        raise Refused(
            f"{path}: there is no preset {named!r}; the nearest is {near!r} (of "
            f"{', '.join(presets())})"
        )
    values = _overlaid(_preset("default"), _preset(named) if named != "default" else {})
    return _checked(path, _overlaid(values, own))


def dump_toml(config: Config) -> str:
    """Every key, as TOML that `load` reads back to an equal value."""
    lines = [f"{key} = {_toml(getattr(config, key))}" for key in ("about", "preset")]
    for section in SECTIONS:
        values = getattr(config, section).model_dump()
        lines += ["", f"[{section}]", *(f"{key} = {_toml(v)}" for key, v in values.items())]
    return "\n".join(lines) + "\n"


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise Refused(f"{path}: {path.stat().st_size} bytes is too large for a config")
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise Refused(f"config {path} cannot be read: {reason}") from error


def _preset(name: str) -> dict[str, Any]:
    text = (files("recast") / "recipes" / "distil" / f"{name}.toml").read_text(encoding="utf-8")
    return {**_parse(name, text), "preset": name}


def _parse(name: str, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise Refused(f"config {name} is not valid TOML: {error}") from error


def _overlaid(base: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Lay `own` over `base`, key by key."""
    merged = dict(base)
    for key, value in own.items():
        below = base.get(key)
        both = isinstance(below, dict) and isinstance(value, Mapping)
        merged[key] = {**below, **value} if both else value  # type: ignore[dict-item]
    return merged


def _checked(path: Path, values: dict[str, Any]) -> Config:
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        found = {d["loc"][:2]: d for d in reversed(error.errors(include_url=False))}
        problems = [_problem(detail) for detail in reversed(list(found.values()))]
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise Refused(f"config {path}: {'; '.join(problems[:SHOWN])}{more}") from error
    if config.blocks.low >= config.blocks.high:
        raise Refused(f"config {path}: blocks.low is not below blocks.high: swap them")
    if config.times.sampler == "assessor" and not config.blocks.assessor:
        raise Refused(
            f"config {path}: times.sampler is 'assessor' and blocks.assessor is empty: name one "
            "that recast assessor train made, or set times.sampler to 'uniform'"
        )
    return config


def _problem(detail: Any) -> str:
    *section, key = (str(part) for part in detail["loc"][:2])
    name = ".".join([*section, key])
    if detail["type"] == "extra_forbidden":
        known = SECTIONS.get(section[0], {}) if section else Config.model_fields
        near = get_close_matches(key, known, 1, 0.0)[0]
        return f"there is no key {name!r:.120}; the nearest is {'.'.join([*section, near])!r}"
    if name == "times.toward" and detail["type"] == "missing":
        return (
            "times.toward is missing: say 'noise' (as the published formula shifts) or 'clean' "
            "(as its comment has it)"
        )
    if detail["type"] == "missing":
        return f"{name} is missing: it has no default"
    if detail["type"] == "literal_error":
        return f"{name} is {detail['input']!r:.60}; permitted are {detail['ctx']['expected']}"
    message = detail["msg"]
    for prefix in ("Input ", "String ", "Value error, "):
        message = message.removeprefix(prefix)
    return f"{name} is {detail['input']!r:.60}; it {message}"


def _toml(value: Any) -> str:
    """A scalar or list; TOML writes them as JSON does, but for the DEL character."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
