"""The sections of a recipe: which keys there are, and what each may hold.

Imports no torch: names of tables (optimizers, distances, ...) are spelled out here and a test
holds them against the tables themselves.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Count = Annotated[int, Field(ge=1, le=10**9)]
Whole = Annotated[int, Field(ge=0, le=10**9)]
Positive = Annotated[float, Field(gt=0)]
Amount = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Line = Annotated[str, StringConstraints(max_length=4096, pattern=r"^[^\x00-\x1f\x7f]*$")]
Names = Annotated[str, StringConstraints(max_length=4096, pattern=r"^[A-Za-z0-9_.,* -]+$")]
Class = Annotated[
    str, StringConstraints(max_length=200, pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)+$")
]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Target(_Section):
    """What the network learns to predict ("same": what it predicts already), and from whom."""

    objective: Literal["eps", "v", "v-zsnr", "flow", "x0", "same"]
    teacher: Literal["teacher", "data", "mix"]
    above: Literal["data", "fallback"]
    mix: Share
    control: bool


class Train(_Section):
    """What is trained and how; `rank` 0 trains a layer whole, `clip` and `ema` 0 are off."""

    profile: Names
    rank: Whole
    steps: Count | Literal["auto"]
    max_steps: Count
    batch: Count
    accumulate: Count
    optimizer: (
        Literal["adamw", "dadaptlion", "dadaptadam", "prodigy", "prodigyplus", "lion", "adafactor"]
        | Class
    )
    lr: Positive
    optimizer_args: dict[str, bool | int | float | str | list[float]]
    schedule: Literal["constant", "linear", "cosine"]
    warmup: Whole
    clip: Amount
    ema: Annotated[float, Field(ge=0, lt=1)]
    distance: Literal["mse", "l1", "huber", "fft"]
    weighting: Literal[
        "uniform", "min-snr", "soft-min-snr", "debiased-kohya", "debiased-onetrainer", "p2"
    ]
    times: Literal["uniform", "stratified", "logit-normal"]
    mean: float
    std: Positive
    shift: Positive
    seed: Seed
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    warm: Literal["none", "clock", "output", "clock,output"]
    checkpoint_every: Count

    @property
    def limit(self) -> int:
        """The step after which a run has ended for certain."""
        return self.steps if isinstance(self.steps, int) else self.max_steps


class Data(_Section):
    """The user's images, or those the original makes: `pictures` of `replay_steps` each."""

    images: Line
    size: Whole
    caption_dropout: Share
    null: Literal["empty", "zero", "both"]
    zero_share: Share
    skip_broken: bool
    prompts: Line
    pictures: Count
    replay_steps: Count
    guidance: Amount
    jitter: Share


class Evaluate(_Section):
    """How the result is measured: `pictures` from the same noise by both models."""

    pictures: Count
    steps: Count
    guidance: Amount
    solver: Names
    batch: Count
    seed: Seed
    prompts: Line
    bins: Annotated[int, Field(ge=1, le=100)]
    judges: list[Line]


class Watch(_Section):
    """What is looked at while training; 0 in `validate_every` and `previews_every` is never."""

    validate_every: Whole
    validate_on: Annotated[int, Field(ge=1, le=256)]
    alarm: bool
    previews_every: Whole
    previews: Annotated[int, Field(ge=1, le=256)]
    preview_steps: Count


class Recipe(_Section):
    """A whole run; sections are frozen, so a recipe is a value."""

    about: Line
    target: Target
    train: Train
    data: Data
    evaluate: Evaluate
    watch: Watch

    def digest(self, *sections: str) -> str:
        """Sha256 of the named sections, or of all but `about`."""
        values = self.model_dump(include=set(sections) or None, exclude={"about"})
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


SECTIONS: dict[str, dict[str, Any]] = {
    "target": dict(Target.model_fields),
    "train": dict(Train.model_fields),
    "data": dict(Data.model_fields),
    "evaluate": dict(Evaluate.model_fields),
    "watch": dict(Watch.model_fields),
}
