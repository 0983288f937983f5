"""What the assessor says of a student's features: three numbers per sample and block, no gradient.

               literal                            relative (default)
    e_t        CE(l_t, k), nats                   relu(CE of student - CE of teacher)
    e_p        H(softmax l_p[k, :]) / ln P        relu(of student - of teacher)
    coh        alpha, the staircase's constant    1 - relu(c of teacher - c of student)
                                                  c = clip(1 - 4 |F_alpha(u) - t|, 0, 1)

Relative signals pair student and teacher on the same sample; they are 0, 0 and 1 where the two
features are the same. The 4 is because a constant u = 1/2 is off by 1/4 in the mean. k and t are
times on the path of the assessor's own objective. In bins that are not active the signals are those
of the teacher itself, so that a weight made of them falls back to its base.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from recast.distill.assessor import Assessor, bin_of
from recast.distill.staircase import staircase
from recast.errors import Refused

Form = Literal["relative", "literal"]


@dataclass(frozen=True)
class AssessorOutput:
    """Signals (B, blocks) in the order of `blocks`; `active` (B,): the sample's bin counts."""

    blocks: tuple[str, ...]
    e_t: Tensor
    e_p: Tensor
    coh: Tensor
    active: Tensor

    def cpu(self) -> AssessorOutput:
        """The same on the CPU."""
        return AssessorOutput(
            self.blocks, self.e_t.cpu(), self.e_p.cpu(), self.coh.cpu(), self.active.cpu()
        )


@torch.no_grad()
def assess(
    assessor: Assessor,
    student_pooled: Mapping[str, Tensor],
    t: Tensor,
    *,
    teacher_pooled: Mapping[str, Tensor] | None = None,
    form: str = "relative",
    active_bins: Tensor | None = None,
) -> AssessorOutput:
    """Signals of pooled features at times t (B,); all bins are active unless `active_bins` (K,).

    Raises Refused for a missing block, an unknown form, and relative signals without the teacher.
    """
    if form not in ("relative", "literal"):
        raise Refused(f"signals are relative or literal, not {form!r}.")
    if form == "relative" and teacher_pooled is None:
        raise Refused("relative signals compare a student with its teacher: give both's features.")
    e_t, e_p, coh = absolute(assessor, student_pooled, t)
    if form == "literal":
        alphas = [assessor.probe(name).alpha for name in assessor.blocks]
        coh = torch.stack(alphas).expand_as(coh)
    elif teacher_pooled is not None:
        t_t, t_p, t_coh = absolute(assessor, teacher_pooled, t)
        e_t, e_p, coh = (e_t - t_t).relu(), (e_p - t_p).relu(), 1 - (t_coh - coh).relu()
    active = torch.ones_like(t, dtype=torch.bool)
    if active_bins is not None:
        active = active_bins.to(t.device)[bin_of(t, assessor.shape.bins)]
    on = active[:, None]
    return AssessorOutput(
        assessor.blocks, e_t.where(on, 0), e_p.where(on, 0), coh.where(on, 1), active
    )


@torch.no_grad()
def absolute(
    assessor: Assessor, pooled: Mapping[str, Tensor], t: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(B, blocks) each: cross-entropy in nats, normalised pattern entropy, staircase coherence."""
    k = bin_of(t, assessor.shape.bins)
    columns = []
    for name, reading in assessor(pooled).items():
        surprise = F.cross_entropy(reading.time_logits, k, reduction="none")
        share = assessor.pattern_logits(name, reading.z, k).log_softmax(1)
        entropy = -(share.exp() * share).sum(1) / math.log(assessor.shape.patterns)
        placed = staircase(reading.u, assessor.probe(name).alpha)
        columns.append((surprise, entropy, (1 - 4 * (placed - t).abs()).clamp(0, 1)))
    e_t, e_p, coh = (torch.stack(each, 1) for each in zip(*columns, strict=True))
    return e_t, e_p, coh
