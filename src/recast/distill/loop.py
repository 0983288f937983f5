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
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from recast.distill.fusion import Fused
from recast.distill.losses import KD_WEIGHT, KDS, LocalHeads, block_term, expressed, target
from recast.errors import NotFinite
from recast.objective import Net, Objective, retime

if TYPE_CHECKING:
    from recast.distill.signals import AssessorOutput

PATIENCE = 3
USUAL_WEIGHT = 0.05
WANTED_RATIO = 0.1  # of the block term to the flow term, by which `auto` sets the weight

Features = Mapping[str, Tensor]
Weigher = Callable[[int, "AssessorOutput | None", Tensor], Tensor | Fused]
"""(step, signals, KD (B, nb) with its gradient) -> the blocks' weights (nb,)."""
Assess = Callable[[Features, Features, Tensor], "AssessorOutput"]
"""(student's features, teacher's, the teacher's times (B,)) -> signals."""


class Noisy(Protocol):
    """A batch: x0, eps, x (B, C, H, W), t (B,); `weight` (B,) makes up for how t was drawn."""

    @property
    def x0(self) -> Tensor: ...
    @property
    def eps(self) -> Tensor: ...
    @property
    def x(self) -> Tensor: ...
    @property
    def t(self) -> Tensor: ...
    @property
    def condition(self) -> Any: ...
    @property
    def weight(self) -> Tensor | None: ...


class Tap(Protocol):
    """What hands over the features of the last forward pass; entered while the loop runs."""

    def __enter__(self) -> Any: ...
    def __exit__(self, *exception: Any) -> Any: ...
    def taken(self) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Tapped:
    """A network as the loop uses it: `bind` a condition, call it, take the blocks' features."""

    bind: Callable[[Any], Net]
    tap: Tap
    objective: Objective


@dataclass
class BlockWeight:
    """What the block term counts: a number, or "auto", set once so that its ratio R is 0.1.

    Until `warmup` steps have been seen auto counts as 0.05.
    """

    asked: float | str
    warmup: int = 50
    flow: float = 0.0
    blocks: float = 0.0
    seen: int = 0
    found: float | None = None

    @property
    def now(self) -> float:
        """The weight in effect."""
        if isinstance(self.asked, str):
            return USUAL_WEIGHT if self.found is None else self.found
        return float(self.asked)

    def see(self, flow: float, blocks: float) -> None:
        """Take note of a step's two terms, the block term without its weight."""
        if not isinstance(self.asked, str) or self.found is not None:
            return
        self.flow, self.blocks, self.seen = self.flow + flow, self.blocks + blocks, self.seen + 1
        if self.seen >= self.warmup and self.blocks > 0:
            self.found = WANTED_RATIO * self.flow / self.blocks

    def state_dict(self) -> dict[str, Any]:
        """All that changes from step to step."""
        return {k: getattr(self, k) for k in ("flow", "blocks", "seen", "found")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        for key, value in state.items():
            setattr(self, key, value)


@dataclass(frozen=True)
class How:
    """What is learned, and how the parts count; see `losses`."""

    share: float = 1.0
    control: bool = True
    kd: str = "pooled"
    kd_weight: float = KD_WEIGHT
    local_weight: float = 0.0


@dataclass(frozen=True)
class DistilStep:
    """One optimizer step; `step` counts those done, this one included.

    `losses`, `times` are (B,): each sample's flow loss before weights, and its time. `kd` (nb,) are
    the blocks' means, `values` (nb,) their weights and `raw` those before mean and sum. `ratio` is
    block term by flow term, `gradient_ratio` that of their gradients' norms, on the steps where it
    is measured. `seconds` is wall time. `skipped` counts steps left out in a row.
    """

    step: int
    loss: float
    flow: float
    blocks: float
    block_weight: float
    ratio: float
    losses: Tensor
    times: Tensor
    kd: Tensor
    values: Tensor
    raw: Tensor
    spread: Tensor
    saturated: float
    gradient_ratio: float | None
    grad_norm: float
    lr: float
    skipped: int
    seconds: float
    scale: float = 1.0


@dataclass
class _Sums:
    """What the micro-batches of one step come to."""

    flow: float = 0.0
    blocks: float = 0.0
    losses: list[Tensor] = field(default_factory=list)
    times: list[Tensor] = field(default_factory=list)
    kd: list[Tensor] = field(default_factory=list)
    fused: Fused | None = None
    gradient_ratio: float | None = None


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
) -> Iterator[DistilStep]:
    """Train what the optimizer holds, `accumulate` draws to a step, until draws run out.

    The teacher's parameters must be frozen. A block weight of 0 taps and weighs nothing. To resume,
    pass `done`, `skipped`, the block weight with its state, and draws that go on. Every
    `gradients_every` steps (0: never) both terms' gradients are taken apart, which costs a backward
    pass. Raises NotFinite at the third step in a row that is not finite.
    """
    how = how or How()
    weight = block_weight if isinstance(block_weight, BlockWeight) else BlockWeight(block_weight)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    device = parameters[0].device.type
    remaining = iter(draws)
    with student.tap, teacher.tap:
        while micro := list(islice(remaining, accumulate)):
            began = time.perf_counter()
            lr = _set_rate(optimizer, schedule(done) if schedule else 1.0)
            optimizer.zero_grad(set_to_none=True)
            forward: AbstractContextManager = (
                torch.autocast(device, autocast) if autocast else nullcontext()
            )
            apart = bool(gradients_every) and done % gradients_every == 0
            sums = _Sums()
            for draw in micro:
                flow, blocks = _terms(
                    student, teacher, draw, sums, how, forward, weigher, done, assess, heads,
                    bool(weight.now),
                )  # fmt: skip
                if apart and sums.gradient_ratio is None:
                    sums.gradient_ratio = gradient_ratio(flow, weight.now * blocks, parameters)
                loss = (flow + weight.now * blocks) / len(micro)
                (scaler.scale(loss) if scaler else loss).backward()
            scale = _unscale(scaler, optimizer)
            norm = torch.nn.utils.clip_grad_norm_(parameters, clip or math.inf).item()

            done += 1
            flow_term, block_term_ = sums.flow / len(micro), sums.blocks / len(micro)
            total, counted = flow_term + weight.now * block_term_, weight.now
            finite = math.isfinite(total) and math.isfinite(norm)
            skipped = 0 if finite else skipped + (not (math.isfinite(total) and scale > 1))
            if finite:
                optimizer.step()
                weight.see(flow_term, block_term_)
            elif skipped >= PATIENCE:
                raise NotFinite(
                    f"step {done}: loss {total} and gradient norm {norm}, the {skipped}. step in a "
                    "row that is not finite; lower the learning rate, or set precision to bf16"
                )
            fused = sums.fused or Fused.plain(torch.zeros(0))
            yield DistilStep(
                done, total, flow_term, block_term_, counted,
                counted * block_term_ / flow_term if flow_term else 0.0,
                torch.cat(sums.losses), torch.cat(sums.times),
                torch.stack(sums.kd).mean(0) if sums.kd else torch.zeros(0),
                fused.values, fused.raw, fused.spread, fused.saturated, sums.gradient_ratio,
                norm, lr, skipped, time.perf_counter() - began, scale,
            )  # fmt: skip


def _terms(
    student: Tapped, teacher: Tapped, draw: Noisy, sums: _Sums, how: How,
    forward: AbstractContextManager, weigher: Weigher, step: int, assess: Assess | None,
    heads: LocalHeads | None, wants_blocks: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The flow term and the block term (without its weight) of one draw, in float32."""
    source, objective = teacher.objective, student.objective
    needs_teacher = bool(how.share) or wants_blocks
    with forward:
        answer, theirs = draw.x0, {}
        if needs_teacher:
            bound = expressed(teacher.bind(draw.condition), source, objective)
            answer = bound(draw.x, draw.t)
        if wants_blocks:
            theirs = teacher.tap.taken()  # before the student answers: both may be one network
        output = student.bind(draw.condition)(draw.x, draw.t).float()
    value, counts = target(
        answer, draw.x, draw.x0, draw.eps, draw.t,
        source=source, objective=objective, share=how.share, control=how.control,
    )  # fmt: skip
    each = (output - value.float()).square().flatten(1).mean(1)
    evened = each * counts if draw.weight is None else each * counts * draw.weight
    flow = evened.mean()
    blocks = torch.zeros_like(flow)
    if wants_blocks:
        mine = student.tap.taken()
        kd = KDS[how.kd](mine, theirs)
        clock = retime(draw.t, objective.path, source.path).clamp(max=1)
        signals = assess(mine, theirs, clock) if assess else None
        weighed = weigher(step, signals, kd)
        sums.fused = weighed if isinstance(weighed, Fused) else Fused.plain(weighed.detach())
        values = weighed.values if isinstance(weighed, Fused) else weighed
        local = None
        if heads is not None and how.local_weight:
            local = heads(mine, objective.target(draw.x0, draw.eps, draw.t))
        blocks = block_term(
            values, kd, local, kd_weight=how.kd_weight, local_weight=how.local_weight
        )
        sums.kd.append(kd.detach().mean(0).cpu())
    sums.flow += flow.item()
    sums.blocks += blocks.item()
    sums.losses.append(each.detach().cpu())
    sums.times.append(draw.t.detach().cpu())
    return flow, blocks


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
