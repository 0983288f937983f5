"""Distillation in memory: a generator that takes draws and yields one DistilStep after another.

    L = mean_i w_i |output - target|² + w_blocks sum_b lambda_b (0.25 KD_b + w_loc Local_b)

Teacher and student see the same noisy sample, each on its own path, and their blocks are tapped in
the same pass that answers. Whoever calls says how the blocks weigh: a Weigher. A step that is not
finite is skipped, parameters and optimizer untouched; three in a row raise NotFinite.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from recast import processes
from recast.distill.fusion import Fused
from recast.distill.losses import KDS, LocalHeads, block_term, expressed, target
from recast.distill.step import (
    USUAL_WEIGHT,
    BlockWeight,
    DistilStep,
    How,
    Noisy,
    Tapped,
    Team,
)
from recast.errors import NotFinite
from recast.objective import retime

if TYPE_CHECKING:
    from recast.distill.signals import AssessorOutput

PATIENCE = 3

Features = Mapping[str, Tensor]
Weigher = Callable[[int, "AssessorOutput | None", Tensor], Tensor | Fused]
"""(step, signals, KD (B, nb) with its gradient) -> the blocks' weights (nb,)."""
Assess = Callable[[Features, Features, Tensor], "AssessorOutput"]
"""(student's features, teacher's, the teacher's times (B,)) -> signals."""


@dataclass(frozen=True)
class _Seen:
    """What one draw came to: both terms, per sample (B,), per block (nb,), and the blocks' weights.

    `fused` is the step's so far: of the last draw that all processes have weighed by then.
    """

    flow: float
    blocks: float
    losses: Tensor
    times: Tensor
    kd: Tensor | None = None
    fused: Fused | None = None
    gradient_ratio: float | None = None


def _told(seen: list[_Seen], weight: float, **more: Any) -> DistilStep:
    """A step of these draws, with what is known of it besides."""
    flow = sum(each.flow for each in seen) / len(seen)
    blocks = sum(each.blocks for each in seen) / len(seen)
    fused = seen[-1].fused or Fused.plain(torch.zeros(0))
    kd = [each.kd for each in seen if each.kd is not None]
    return DistilStep(
        loss=flow + weight * blocks, flow=flow, blocks=blocks, block_weight=weight,
        ratio=weight * blocks / flow if flow else 0.0,
        losses=torch.cat([each.losses for each in seen]),
        times=torch.cat([each.times for each in seen]),
        kd=torch.stack(kd).mean(0) if kd else torch.zeros(0),
        values=fused.values.detach(), raw=fused.raw.detach(), spread=fused.spread,
        saturated=fused.saturated, gradient_ratio=seen[0].gradient_ratio, **more,
    )  # fmt: skip


@dataclass(frozen=True)
class _Both:
    """Student and teacher, and how a batch becomes the two terms."""

    student: Tapped
    teacher: Tapped
    how: How
    weigher: Weigher
    assess: Assess | None
    heads: LocalHeads | None
    autocast: torch.dtype | None
    team: Team | None

    def terms(self, draw: Noisy, step: int, blocks: bool) -> tuple[Tensor, Tensor, _Seen]:
        """The flow term and the block term (without its weight) of one draw, in float32."""
        answer, output, theirs = self.answers(draw, blocks)
        how = self.how
        value, counts = target(
            answer, draw.x, draw.x0, draw.eps, draw.t, source=self.teacher.objective,
            objective=self.student.objective, share=how.share, control=how.control,
        )  # fmt: skip
        each = (output - value.float()).square().flatten(1).mean(1)
        flow = (each * counts if draw.weight is None else each * counts * draw.weight).mean()
        term, kd, fused = torch.zeros_like(flow), None, None
        if blocks:
            term, kd, fused = self.block_term(draw, theirs, step)
        told = (each.detach().cpu(), draw.t.detach().cpu(), kd, fused)
        return flow, term, _Seen(flow.item(), term.item(), *told)

    def answers(self, draw: Noisy, blocks: bool) -> tuple[Tensor, Tensor, Features]:
        """The teacher's answer in the student's objective, the student's, the teacher's blocks."""
        answer, theirs = draw.x0, {}
        device = draw.x.device.type
        with torch.autocast(device, self.autocast) if self.autocast else nullcontext():
            if self.how.share or blocks:
                bound = self.teacher.bind(draw.condition)
                net = expressed(bound, self.teacher.objective, self.student.objective)
                answer = net(draw.x, draw.t)
            if blocks:
                theirs = self.teacher.tap.taken()  # before the student answers: it may be the same
            output = self.student.bind(draw.condition)(draw.x, draw.t).float()
        return answer, output, theirs

    def block_term(self, draw: Noisy, theirs: Features, step: int) -> tuple[Tensor, Tensor, Fused]:
        """L_blocks of one draw: distances, signals, weights; and the last two of these."""
        how, mine = self.how, self.student.tap.taken()
        kd = KDS[how.kd](mine, theirs)
        source, objective = self.teacher.objective, self.student.objective
        clock = retime(draw.t, objective.path, source.path).clamp(max=1)
        signals = self.assess(mine, theirs, clock) if self.assess else None
        own, last = self.weighed(step, signals, kd)
        local = None
        if self.heads is not None and how.local_weight:
            local = self.heads(mine, objective.target(draw.x0, draw.eps, draw.t))
        term = block_term(
            own.values, kd, local, kd_weight=how.kd_weight, local_weight=how.local_weight
        )
        return term, kd.detach().mean(0).cpu(), last

    def weighed(self, step: int, signals: AssessorOutput | None, kd: Tensor) -> tuple[Fused, Fused]:
        """The weights of this draw's blocks, and of the last draw that was weighed.

        A weigher may remember what it saw: every process shows it everybody's draws, in order.
        """
        if self.team is None:
            found = [self.weigher(step, signals, kd)]
            place = 0
        else:
            place = processes.rank()
            told = self.team.woven([(signals and signals.cpu(), kd.detach().cpu())])
            told[place] = (signals, kd)
            found = [self.weigher(step, *each) for each in told]
        fused = [each if isinstance(each, Fused) else Fused.plain(each) for each in found]
        return fused[place], fused[-1]


def distil(
    student: Tapped,
    teacher: Tapped,
    draws: Iterable[Noisy],
    *,
    optimizer: Optimizer,
    weigher: Weigher,
    block_weight: float | str | BlockWeight = USUAL_WEIGHT,
    how: How | None = None,
    assess: Assess | None = None,
    heads: LocalHeads | None = None,
    accumulate: int = 1,
    clip: float = 1.0,
    schedule: Callable[[int], float] | None = None,
    gradients_every: int = 0,
    done: int = 0,
    skipped: int = 0,
    autocast: torch.dtype | None = None,
    scaler: GradScaler | None = None,
    team: Team | None = None,
) -> Iterator[DistilStep]:
    """Train what the optimizer holds, `accumulate` draws to a step, until draws run out.

    The teacher's parameters must be frozen. A block weight of 0 taps and weighs nothing. To resume,
    pass `done`, `skipped`, the block weight with its state, and draws that go on. Every
    `gradients_every` steps (0: never) both terms' gradients are taken apart, which costs a backward
    pass. A `team` of processes takes `accumulate` draws each, and the same step on all of them
    together. Raises NotFinite at the third step in a row that is not finite.
    """
    weight = block_weight if isinstance(block_weight, BlockWeight) else BlockWeight(block_weight)
    both = _Both(student, teacher, how or How(), weigher, assess, heads, autocast, team)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    remaining = iter(draws)
    with student.tap, teacher.tap:
        while micro := list(islice(remaining, accumulate)):
            began = time.perf_counter()
            lr = _set_rate(optimizer, schedule(done) if schedule else 1.0)
            optimizer.zero_grad(set_to_none=True)
            apart = bool(gradients_every) and done % gradients_every == 0
            seen = _gradients(both, micro, done, weight.now, parameters, apart, scaler)
            scale = _unscale(scaler, optimizer)
            norm = torch.nn.utils.clip_grad_norm_(parameters, clip or math.inf).item()
            done += 1
            told = _told(seen, weight.now, step=done, grad_norm=norm, lr=lr, skipped=0, seconds=0.0)
            finite = math.isfinite(told.loss) and math.isfinite(norm)
            overflows = math.isfinite(told.loss) and not finite and scale > 1
            skipped = 0 if finite else skipped + (not overflows)
            if finite:
                optimizer.step()
                weight.see(told.flow, told.blocks)
            elif skipped >= PATIENCE:
                raise NotFinite(
                    f"step {done}: loss {told.loss} and gradient norm {norm}, the {skipped}. step "
                    "in a row that is not finite; lower the learning rate, or set precision to bf16"
                )
            seconds = time.perf_counter() - began
            yield replace(told, skipped=skipped, seconds=seconds, scale=scale)


def _gradients(
    both: _Both, micro: list[Noisy], step: int, weight: float, parameters: list[Tensor],
    apart: bool, scaler: GradScaler | None,
) -> list[_Seen]:  # fmt: skip
    """Add up the gradients of one step's draws, in their order; returns what all came to."""
    found: list[_Seen] = []
    team = both.team
    count = len(micro) * (team.count if team else 1)
    for draw in micro:
        flow, blocks, seen = both.terms(draw, step, bool(weight))
        if apart and not found and processes.first():
            ratio = gradient_ratio(flow, weight * blocks, parameters)
            seen = replace(seen, gradient_ratio=ratio)
        loss = (flow + weight * blocks) / count
        (scaler.scale(loss) if scaler else loss).backward()
        if team:
            team.take([p for p in parameters if p.grad is not None])
        found.append(seen)
    if team is None:
        return found
    team.give(parameters)
    return team.woven(found)


def gradient_ratio(flow: Tensor, blocks: Tensor, parameters: list[Tensor]) -> float:
    """The norm of the second term's gradient by that of the first one's; graphs are kept."""
    if not blocks.requires_grad:
        return 0.0
    norms = []
    for term in (blocks, flow):
        found = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
        norms.append(
            math.sqrt(sum(g.float().square().sum().item() for g in found if g is not None))
        )
    return norms[0] / norms[1] if norms[1] else math.inf


def _set_rate(optimizer: Optimizer, factor: float) -> float:
    """Every group's rate becomes `factor` times the one it was built with; returns the first."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
    return float(optimizer.param_groups[0]["lr"])


def _unscale(scaler: GradScaler | None, optimizer: Optimizer) -> float:
    """Divide the gradients by the loss's scale, which is returned, and let the scale adapt."""
    if scaler is None:
        return 1.0
    scale = scaler.get_scale()
    scaler.unscale_(optimizer)
    scaler.update()
    return scale
