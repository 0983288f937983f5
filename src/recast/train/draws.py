"""What one training step sees: data, noise, time, and the noisy sample they make.

    x = alpha(t) x0 + sigma(t) eps

Draws are pure functions of (seed, step), so a resumed run needs no position in a random stream.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recast.errors import Refused
from recast.objective import Objective, slopes

TOLERANCE = 0.02  # how far a slope of the data contract may be from 1


@dataclass(frozen=True)
class Draw:
    """A batch of noisy samples: x0, eps, x are (B, C, H, W), t is (B,) in [0, 1].

    `condition` is what the net is bound to. `index` (B,) says which examples these are.
    `teacher` is the original's answer (x0, eps) where it is already known: replay. `weight` (B,)
    makes up for times that were drawn more or less often than others, and is what a folder of
    images counts. `added` is noise in x that x0 and eps do not account for. `mask` (B, 1, H, W) in
    [0, 1] is what each place counts. `shake` seeds what the net draws while it answers: dropouts.
    """

    x0: Tensor
    eps: Tensor
    t: Tensor
    x: Tensor
    condition: Any = None
    index: Tensor | None = None
    teacher: tuple[Tensor, Tensor] | None = None
    weight: Tensor | None = None
    added: Tensor | None = None
    mask: Tensor | None = None
    shake: int | None = None


def noised(
    objective: Objective,
    x0: Tensor,
    t: Tensor,
    eps: Tensor,
    condition: Any = None,
    index: Tensor | None = None,
) -> Draw:
    """Noise data along the objective's path."""
    return Draw(x0, eps, t, objective.noise(x0, eps, t), condition, index)


def replayed(
    objective: Objective,
    x0: Tensor,
    t: Tensor,
    eps: Tensor,
    condition: Any = None,
    index: Tensor | None = None,
) -> Draw:
    """A stored answer (x0, eps) of the original, given at the state that the two make up.

    An answer and its state determine each other on every path: x = alpha x0 + sigma eps holds
    exactly for the answer, so the state itself need not be stored. `t` is on the objective's
    path; from another one it is `objective.path.time(*source.path(t))`.
    """
    state = objective.noise(x0, eps, t)
    return Draw(x0, eps, t, state, condition, index, teacher=(x0, eps))


def seeded(*counters: int | str) -> torch.Generator:
    """A CPU generator that is a pure function of the counters, say (seed, "noise", step)."""
    digest = hashlib.blake2b(repr(counters).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest) >> 1)


def checked(draws: Iterable[Draw], objective: Objective, first: int = 4) -> Iterator[Draw]:
    """Pass draws on, with the data contract checked on the first few.

    Regresses x on alpha x0 and sigma eps together. Raises Refused unless both slopes are 1 within
    2 %: a student shown states that its targets do not belong to learns blobs.
    """
    for number, draw in enumerate(draws):
        if number < first:
            check(draw, objective)
        yield draw


def check(draw: Draw, objective: Objective) -> None:
    """Raise Refused unless the draw's x is its x0 and eps, noised along the objective's path."""
    clean = draw.x if draw.added is None else draw.x - draw.added
    if not draw.x0.any():
        raise Refused("the latents of a draw are all zero; remake the cache they came from")
    for name, slope in slopes(objective.path, clean, draw.x0, draw.eps, draw.t).items():
        if not abs(slope - 1) <= TOLERANCE:
            raise Refused(
                f"noised latents hold {slope:.3f} times the {name} that the {objective.name} path "
                "prescribes; noise them along the path of the objective that is trained"
            )
