"""What the network shall answer: the data's output, the original's, or a mix of both.

    data       a x0 + b eps                      unbiased, noisy, pulls towards the images
    teacher    express(original, source, target) noise-free, keeps what the original knows

An eps teacher says nothing above its own last noise level (flow t = 0.936 for SD's schedule).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from recast.objective import Net, Objective, express
from recast.train.draws import Draw


@dataclass(frozen=True)
class Answer:
    """The output wanted for each sample, (B, C, H, W), and how much each counts, (B,)."""

    value: Tensor
    weight: Tensor


Target = Callable[[Draw], Answer]
Teacher = Callable[[Any], Net]  # condition -> the original, answering as it was trained
Share = Callable[[Tensor], Tensor]  # t (B,) -> weight (B,)


def from_data(objective: Objective) -> Target:
    """The output that the data and noise of a draw prescribe."""

    def target(draw: Draw) -> Answer:
        value = objective.target(draw.x0, draw.eps, draw.t)
        return Answer(value, torch.ones_like(draw.t))

    return target


def from_teacher(
    teacher: Teacher,
    source: Objective,
    objective: Objective,
    *,
    above: Literal["data", "fallback", "both"] = "data",
    control: bool = False,
) -> Target:
    """The output of the original, expressed in the new objective; replay draws bring it along.

    Above the source's range the data target takes over, or the original's answer at its last
    noise level (`fallback`), or the mean of the two (`both`). `control` weights by
    min(1, alpha²/0.05), against the growth of the teacher's error by 1/alpha.
    """

    def answer(draw: Draw) -> Tensor:
        if draw.teacher is not None:
            return objective.target(*draw.teacher, draw.t)
        with torch.no_grad():
            value = express(teacher(draw.condition), source, objective)(draw.x, draw.t)
        if above == "fallback":
            return value
        inside = source.path.covers(*objective.path(draw.t)).view(-1, 1, 1, 1)
        data = objective.target(draw.x0, draw.eps, draw.t)
        return torch.where(inside, value, data if above == "data" else (data + value) / 2)

    def target(draw: Draw) -> Answer:
        alpha, _ = objective.path(draw.t)
        weight = (alpha.square() / 0.05).clamp(max=1) if control else torch.ones_like(draw.t)
        return Answer(answer(draw), weight)

    return target


def guided(teacher: Teacher, null: Callable[[Any], Any], scale: float) -> Teacher:
    """A teacher that answers as guidance would have it: n + scale (c - n), n without the prompt.

    `null` gives the condition without prompt that belongs to a condition. What learns from it
    paints as with guidance in one pass (Meng et al. 2023); rows without prompt stay as they are.
    """

    def bound(condition: Any) -> Net:
        prompted, unprompted = teacher(condition), teacher(null(condition))

        def answer(x: Tensor, t: Tensor) -> Tensor:
            n = unprompted(x, t)
            return n + scale * (prompted(x, t) - n)

        return answer

    return bound


def mix(*parts: tuple[Target, Share]) -> Target:
    """Several targets, each with its weight as a function of t.

    The parts are averaged and their weights added: for the squared distance that has the same
    gradient as the weighted sum of the losses. Samples where every weight is 0 count nothing.
    """

    def target(draw: Draw) -> Answer:
        answers = [(part(draw), share(draw.t)) for part, share in parts]
        weights = [answer.weight * share for answer, share in answers]
        total = torch.stack(weights).sum(0)
        shares = [w / total.clamp(min=1e-12) for w in weights]
        values = [a.value * s.view(-1, 1, 1, 1) for (a, _), s in zip(answers, shares, strict=True)]
        return Answer(torch.stack(values).sum(0), total)

    return target
