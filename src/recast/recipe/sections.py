"""The sections of a recipe: which keys there are, and what each may hold.

Imports no torch: names of tables (optimizers, distances, ...) are spelled out here and a test
holds them against the tables themselves.
"""

from __future__ import annotations

import hashlib
import json
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, StringConstraints

Count = Annotated[int, Field(ge=1, le=10**9)]
Whole = Annotated[int, Field(ge=0, le=10**9)]
Positive = Annotated[float, Field(gt=0)]
Amount = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Line = Annotated[str, StringConstraints(max_length=4096, pattern=r"^[^\x00-\x1f\x7f]*$")]
Names = Annotated[str, StringConstraints(max_length=4096, pattern=r"^[A-Za-z0-9_.,* -]+$")]
Class = Annotated[
    str, StringConstraints(max_length=200, pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)+$")
]


def _curve(most: float) -> PlainValidator:
    """Permit a number or points [[t, w], ...] with t rising within 0 to 1 and w in 0 to `most`."""

    def within(value: Any, limit: float) -> bool:
        return type(value) in (int, float) and 0 <= value <= limit

    def check(value: Any) -> float | list[list[float]]:
        points = value if isinstance(value, list) else [[0, value]]
        whole = all(isinstance(p, list) and len(p) == 2 for p in points)
        right = whole and all(within(t, 1) and within(w, most) for t, w in points)
        if not (right and points) or any(a[0] >= b[0] for a, b in pairwise(points)):
            ends = f"from 0 to {most}" if most < MANY else "of 0 or more"
            raise ValueError(
                f"should be a number {ends}, or points [[t, w], ...] with t rising "
                f"from 0 to 1 at most and each w a number {ends}"
            )
        floats = [[float(t), float(w)] for t, w in points]
        return floats if isinstance(value, list) else floats[0][1]

    return PlainValidator(check)


MANY = 1e9
Shares = Annotated[float | list[list[float]], _curve(1)]
Weights = Annotated[float | list[list[float]], _curve(MANY)]


# objectives that people ask for and that no network can have
IMPOSSIBLE = dict.fromkeys(
    ("eps-zsnr", "epsilon-zsnr", "eps-ztsnr"),
    "with zero terminal SNR a path ends in pure noise, where eps is the input itself and says "
    "nothing of the picture: choose v-zsnr or flow",
)


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Target(_Section):
    """What the network learns to predict ("same": what it predicts already), and from whom."""

    objective: Literal["eps", "v", "v-zsnr", "flow", "x0", "same"]
    teacher: Literal["teacher", "data", "mix"]
    above: Literal["data", "fallback", "both"]
    mix: Shares
    control: bool
    guided: Amount


class Train(_Section):
    """What is trained and how; `rank` 0 trains a layer whole, `clip` and `ema` 0 are off.

    `widen` names further layers, "" none, that join after the share `widen_at` of the steps.
    """

    profile: Names
    rates: dict[Names, Positive]
    widen: Annotated[str, StringConstraints(max_length=4096, pattern=r"^[A-Za-z0-9_.,* -]*$")]
    widen_at: Share
    widen_rate: Positive
    rank: Whole
    steps: Count | Literal["auto"]
    max_steps: Count
    batch: Count
    accumulate: Count
    optimizer: (
        Literal[
            "adamw",
            "adamw8bit",
            "adafactor",
            "lion",
            "saveus",
            "dadaptlion",
            "dadaptadam",
            "dadaptadan",
            "dadaptadagrad",
            "dadaptsgd",
            "prodigy",
            "prodigyplus",
        ]
        | Class
    )
    lr: Positive
    optimizer_args: dict[str, bool | int | float | str | list[float]]
    schedule: Literal["constant", "linear", "cosine", "cosine-restarts", "polynomial", "rex"]
    cycles: Amount
    power: Positive
    floor: Share
    warmup: Whole
    warmup_epochs: Amount
    min_steps: Whole
    max_epochs: Whole
    max_minutes: Amount
    clip: Amount
    ema: Annotated[float, Field(ge=0, lt=1)]
    distance: Literal["mse", "l1", "huber", "fft"]
    huber_c: Annotated[float, Field(gt=0, le=1)]
    huber_schedule: Literal["constant", "exponential", "snr"]
    fft_phase: Amount
    fft_bands: Annotated[list[Amount], Field(max_length=64)]
    weighting: Literal[
        "uniform", "min-snr", "soft-min-snr", "debiased-kohya", "debiased-onetrainer", "p2", "edm2"
    ]
    gamma: Positive
    p2_k: Positive
    p2_gamma: Amount
    edm2_lr: Positive
    curve: Weights
    times: Literal["uniform", "stratified", "logit-normal", "stratified-logit-normal", "loss-aware"]
    mean: float
    std: Positive
    aware_floor: Annotated[float, Field(gt=0, le=1)]
    shift: Positive
    shift_side: Whole
    seed: Seed
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    base: Literal["full", "8bit", "4bit"]
    warm: Literal["auto", "none", "clock"]
    masters: Literal["fp32", "bf16"]
    recompute: bool
    compile: bool
    channels_last: bool
    rollbacks: Annotated[int, Field(ge=0, le=10)]
    checkpoint_every: Count

    @property
    def limit(self) -> int:
        """The step after which a run has ended for certain."""
        return self.steps if isinstance(self.steps, int) else self.max_steps

    @property
    def places(self) -> str:
        """Every layer that is trained sooner or later, as a profile."""
        return f"{self.profile},{self.widen}" if self.widen else self.profile


class Network(_Section):
    """What is put into the layers; `dim`, `alpha` and their `conv_` twins are a LoRA's alone.

    Dropouts act on what is learned, never on the weights it began with.
    """

    kind: Literal["auto", "principal", "lora", "full"]
    dim: Count
    alpha: Positive
    conv_dim: Whole
    conv_alpha: Positive
    weights: Line
    dropout: Rate
    rank_dropout: Rate
    module_dropout: Rate
    text_stop: Whole
    text_share: Annotated[float, Field(gt=0, le=1)]
    save: Literal["fp32", "fp16", "bf16"]
    merge: bool


class Noise(_Section):
    """How the noise on images departs from plain; 0 in each is off. Replay brings its own."""

    multires: Whole
    multires_discount: Share
    offset: Amount
    perturbation: Amount
    pairing: Literal["none", "optimal"]


class Data(_Section):
    """The user's images, those the original makes (`pictures` of `replay_steps` each), or both.

    `vae`: another latent space to convert into; `vae_scale` 0 takes what it says of itself.
    """

    images: Line
    source: Literal["auto", "images", "replay", "dreams", "mix"]
    mix_with: Literal["replay", "dreams"]
    mix_share: Annotated[float, Field(gt=0, le=1)]
    vae: Line
    vae_scale: Amount
    vae_shift: float
    vae_fold: bool
    size: Whole
    caption_dropout: Share
    null: Literal["empty", "zero", "both"]
    zero_share: Share
    skip_broken: bool
    prompts: Line
    grammar_level: Annotated[int, Field(ge=0, le=5)]
    pictures: Whole
    dream_size: Whole
    replay_solver: Names
    replay_steps: Count
    guidance: Amount
    jitter: Share


class Images(_Section):
    """What every folder of images gets that does not say otherwise itself; kohya's words.

    `caption_variants` and `image_variants` are how many of each are cached where a setting makes
    them vary; 0 in the bucket limits is half and twice the side.
    """

    class_tokens: Line
    caption_extension: Annotated[str, StringConstraints(pattern=r"^(\.[A-Za-z0-9]{1,16})?$")]
    on_missing_caption: Literal["empty", "refuse", "skip"]
    shuffle_caption: bool
    keep_tokens: Whole
    keep_tokens_separator: Line
    caption_separator: Annotated[Line, StringConstraints(min_length=1)]
    secondary_separator: Line
    enable_wildcard: bool
    caption_prefix: Line
    caption_suffix: Line
    caption_dropout_every_n_epochs: Whole
    caption_tag_dropout_rate: Share
    caption_variants: Annotated[int, Field(ge=1, le=1000)]
    flip_aug: bool
    color_aug: bool
    random_crop: bool
    image_variants: Annotated[int, Field(ge=1, le=1000)]
    alpha_mask: bool
    masks: Line
    prior_loss_weight: Amount
    enable_bucket: bool | Literal["auto"]
    min_bucket_reso: Whole
    max_bucket_reso: Whole
    bucket_reso_steps: Count
    bucket_no_upscale: bool


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
    """What is looked at while training; 0 in what ends in `_every` or `_epochs` is never.

    `prompts` names a file of previews to paint instead of the original's, "" none.
    """

    validate_every: Whole
    validate_epochs: Whole
    validate_on: Annotated[int, Field(ge=1, le=256)]
    validate_share: Rate
    alarm: bool
    previews_every: Whole
    previews_epochs: Whole
    previews_first: bool
    previews: Annotated[int, Field(ge=1, le=256)]
    preview_steps: Count
    preview_solver: Line
    prompts: Line


class Save(_Section):
    """Which adapters stay beside the last one: no part of what a run comes to."""

    every: Whole
    epochs: Whole
    keep_last: Whole
    keep_every: Whole


class Recipe(_Section):
    """A whole run; sections are frozen, so a recipe is a value."""

    about: Line
    target: Target
    train: Train
    network: Network
    noise: Noise
    data: Data
    images: Images
    evaluate: Evaluate
    watch: Watch
    save: Save

    def digest(self, *sections: str) -> str:
        """Sha256 of the named sections, or of all but `about`."""
        values = self.model_dump(include=set(sections) or None, exclude={"about"})
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


SECTIONS: dict[str, dict[str, Any]] = {
    "target": dict(Target.model_fields),
    "train": dict(Train.model_fields),
    "network": dict(Network.model_fields),
    "noise": dict(Noise.model_fields),
    "data": dict(Data.model_fields),
    "images": dict(Images.model_fields),
    "evaluate": dict(Evaluate.model_fields),
    "watch": dict(Watch.model_fields),
    "save": dict(Save.model_fields),
}
