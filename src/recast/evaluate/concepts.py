"""What the pocket world's judge finds: concepts kept, concepts forgotten, watermarks leaked.

    alignment   share of right pictures among prompts whose concepts are in the training images
    retention   the same among prompts with a concept that is absent from them
    leakage     share of all pictures that carry a watermark

A picture is right when *every* attribute of its prompt is (a mean over attributes hides the one
that was lost); `attributes` holds each by itself. A prompt's concepts are in the training images
when each of its words is in some training caption.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from recast.pocket.judge import agreement
from recast.pocket.world import Scene, parse


@dataclass(frozen=True)
class Concepts:
    """Shares in [0, 1], None where no prompt is of that kind; `seen` and `absent` are counts."""

    alignment: float | None
    retention: float | None
    leakage: float
    right: float
    seen: int
    absent: int
    attributes: dict[str, float] = field(default_factory=dict)


def scenes(prompts: Sequence[str]) -> list[Scene] | None:
    """The scenes that prompts of the pocket world describe; None when one is no such prompt."""
    try:
        return [parse(prompt) for prompt in prompts]
    except ValueError:
        return None


def present(prompts: Sequence[str], captions: Iterable[str]) -> list[bool]:
    """Say of each prompt whether all of its words occur in the training captions."""
    known = {word for caption in captions for word in caption.lower().split()}
    return [set(prompt.lower().split()) <= known for prompt in prompts]


def concepts(pictures: Sequence[Tensor], batch: Sequence[Scene], seen: Sequence[bool]) -> Concepts:
    """Judge pictures (3, 64, 64) in [-1, 1] against their scenes; `seen` as of `present`."""
    inside = [k for k, flag in enumerate(seen) if flag]
    outside = [k for k, flag in enumerate(seen) if not flag]

    def judged(chosen: Sequence[int]) -> dict[str, float]:
        return agreement(torch.stack([pictures[k] for k in chosen]), [batch[k] for k in chosen])

    whole = judged(range(len(pictures)))
    return Concepts(
        alignment=judged(inside)["all"] if inside else None,
        retention=judged(outside)["all"] if outside else None,
        leakage=whole["watermark"],
        right=whole["all"],
        seen=len(inside),
        absent=len(outside),
        attributes={
            name: value for name, value in whole.items() if name not in ("all", "watermark")
        },
    )
