"""What a run of `recast assessor train` is asked for, and what names its pieces.

t_signal   clock         the network is told the time of its input, and that time is read
           noise_level   it is told any time, and that of its input is read
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from recast.errors import Refused

Split = Literal["train", "validate", "test", "mismatch"]
SIGNALS = ("clock", "noise_level")
SPLITS: tuple[Split, ...] = ("train", "validate", "test", "mismatch")
FIT_ONLY = ("bins", "patterns", "d", "hidden", "prototypes", "pattern_head", "steps", "batch", "lr",
            "weight_decay", "threshold", "feature_similarity_weight")  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Sizes and choices; `pictures` are dreamt where there are no images.

    samples: noised latents that are learned from; `test` as many again are measured. dropout: the
    share of them without their prompt. threshold: the accuracy a bin needs to be believed.
    Raises Refused for what cannot be.
    """

    pictures: int = 400
    samples: int = 20000
    test: int = 10000
    bins: int = 100
    patterns: int = 10
    d: int = 128
    hidden: int = 256
    prototypes: str = "per_bin"
    pattern_head: str = "subcentre"
    where: str = "pre_resample"
    pooling: str = "mean"
    t_signal: str = "clock"
    steps: int = 3000
    batch: int = 256
    lr: float = 1e-3
    weight_decay: float = 1e-4
    threshold: float = 0.15
    dropout: float = 0.1
    seed: int = 0
    feature_similarity_weight: float = 0.0

    def __post_init__(self) -> None:
        from recast.distill.assessor import Shape
        from recast.distill.fit import Weights
        from recast.distill.taps import POOLINGS, WHERE

        for what, value, known in (
            ("t_signal", self.t_signal, SIGNALS),
            ("where", self.where, WHERE),
            ("pooling", self.pooling, POOLINGS),
        ):
            if value not in known:
                raise Refused(f"{what} is one of {', '.join(known)}, not {value!r}.")
        Shape(
            {"mid": 1}, bins=self.bins, patterns=self.patterns,
            prototypes=self.prototypes, pattern_head=self.pattern_head,  # type: ignore[arg-type]
        )  # fmt: skip
        Weights(feature_similarity_weight=self.feature_similarity_weight)
        if self.samples < self.batch:
            raise Refused(f"{self.samples} samples are less than one batch of {self.batch}.")

    def count(self, split: Split, *, control: bool = False) -> int:
        """How many samples a split has; of the random network's test a quarter."""
        quarter = max(1, self.test // 4)
        sizes = {"train": self.samples, "validate": max(1, self.samples // 8),
                 "test": quarter if control else self.test, "mismatch": quarter}  # fmt: skip
        return sizes[split]

    def of_features(self) -> dict[str, Any]:
        """Those that features depend on; not the counts, since splits are cut into chunks."""
        own = {key: value for key, value in asdict(self).items() if key not in FIT_ONLY}
        return {key: value for key, value in own.items() if key not in ("samples", "test")}


def digest(values: Mapping[str, Any]) -> str:
    """16 hex digits that name settings and what they were applied to."""
    text = json.dumps(dict(values), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def with_options(settings: Settings, **given: Any) -> Settings:
    """Settings with what the command line says laid over them; None leaves them."""
    return replace(settings, **{key: value for key, value in given.items() if value is not None})
