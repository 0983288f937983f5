"""The training loop: a generator that takes draws and yields one Step after another.

    draw -> losses per sample -> backward -> (accumulate) -> clip -> optimizer -> Step

The caller logs, saves, samples and stops. A step whose loss or gradient is not finite is skipped
with parameters and optimizer untouched; three in a row raise NotFinite.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from recast.errors import NotFinite
from recast.train.draws import Draw
from recast.train.ema import Ema
from recast.train.loss import Criterion, Student
from recast.train.schedules import Schedule
from recast.train.team import Team, norm_of

PATIENCE = 3  # steps in a row that may be skipped before the run counts as diverged


@dataclass(frozen=True)
class Step:
    """One optimizer step; `step` counts the steps done, this one included.

    `losses` and `times` are (B,) on the CPU over all accumulated draws: the distance of each
    sample before weighting, and where on the path it lay; `weighted` are the distances weighted,
    and `loss` the mean of these that was minimised. `lr` is the rate in effect (times `d`, which is
    1 unless the optimizer adapts it), `rates` that of every group with a "name". `skipped` counts
    the steps skipped in a row up to here: 0 if this one was taken. `scale` is that of fp16 losses;
    a step whose scaled gradients overflow is left out, too, but only halves it.
    """

    step: int
    loss: float
    losses: Tensor
    times: Tensor
    weighted: Tensor
    grad_norm: float
    lr: float
    d: float
    skipped: int
    scale: float = 1.0
    rates: Mapping[str, float] = field(default_factory=dict)


def plainly(optimizer: Optimizer) -> None:
    """Take a step as torch does."""
    optimizer.step()


def train(
    net: Student,
    draws: Iterable[Draw],
    criterion: Criterion,
    optimizer: Optimizer,
    *,
    accumulate: int = 1,
    clip: float | None = 1.0,
    schedule: Schedule | None = None,
    ema: Ema | None = None,
    done: int = 0,
    skipped: int = 0,
    autocast: torch.dtype | None = None,
    partner: Optimizer | None = None,
    backward: Callable[[Tensor], None] = torch.Tensor.backward,
    scaler: GradScaler | None = None,
    move: Callable[[Optimizer], None] = plainly,
    team: Team | None = None,
) -> Iterator[Step]:
    """Train everything the optimizer holds, `accumulate` draws to a step, until draws run out.

    Accumulated draws count alike, whatever their batch size. To resume, pass `done` and
    `skipped` of the last Step and draws that go on where it stopped. `autocast` is the dtype of
    the net's forward pass; losses are fp32. `partner` holds what the criterion learns by itself;
    it steps along, unclipped and at its own rate. `backward` is accelerate's when it drives the
    run. `scaler` is for nets in fp16, whose small gradients are 0 otherwise; `move` takes the
    optimizer's step. A `team` of processes takes `accumulate` draws each, and the same step on all
    of them together. Raises NotFinite at the third step in a row that is not finite; then the state
    last saved is the one to go back to.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    also = [p for group in partner.param_groups for p in group["params"]] if partner else []
    device = parameters[0].device.type
    remaining = iter(draws)
    while micro := list(islice(remaining, accumulate)):
        set_rate(optimizer, schedule(done) if schedule else 1.0, done)
        for each in (optimizer, partner):
            if each:
                each.zero_grad(set_to_none=True)
        forward: AbstractContextManager = (
            torch.autocast(device, autocast) if autocast else nullcontext()
        )

        # gradients
        seen = _backward(net, micro, criterion, forward, backward, scaler, team, parameters + also)
        scale = _unscale(scaler, optimizer, partner)
        norm = _clip(parameters, clip, team)
        shares, losses, weighted, times = (torch.cat(each) for each in zip(*seen, strict=True))
        total = shares.sum().item()

        # update
        done += 1
        finite = math.isfinite(total) and math.isfinite(norm)
        overflows = math.isfinite(total) and not finite and scale > 1
        skipped = 0 if finite else skipped + (not overflows)
        lr, d = rate(optimizer)
        if finite:
            move(optimizer)
            if partner:
                partner.step()
            if ema:
                ema.update()
        elif skipped >= PATIENCE:
            raise NotFinite(
                f"step {done}: loss {total} and gradient norm {norm}, "
                f"the {skipped}. step in a row that is not finite; lower the learning rate"
            )
        yield Step(
            done, total, losses.cpu(), times.cpu(), weighted.cpu(), norm, lr, d, skipped, scale,
            rates(optimizer),
        )  # fmt: skip


def _backward(
    net: Student,
    micro: list[Draw],
    criterion: Criterion,
    forward: AbstractContextManager,
    backward: Callable[[Tensor], None],
    scaler: GradScaler | None,
    team: Team | None,
    parameters: list[Tensor],
) -> list[list[Tensor]]:
    """Add up the gradients of one step; returns each draw's share of its loss, distance, weighted,
    times.

    A draw's own weight evens out its times and is no part of what is told of its samples.
    """
    found = []
    count = len(micro) * (team.count if team else 1)
    for draw in micro:
        with forward:
            seen = criterion(net, draw)
        evened = seen.weighted if draw.weight is None else seen.weighted * draw.weight
        loss = evened.mean() / count
        backward(scaler.scale(loss) if scaler else loss)
        told = (loss[None], seen.distance, seen.weighted, draw.t)
        found.append([each.detach().float() for each in told])
        if team:
            team.take(parameters)
    if team:
        team.give(parameters)
        return team.woven([[each.cpu() for each in told] for told in found])
    return found


def _unscale(scaler: GradScaler | None, *optimizers: Optimizer | None) -> float:
    """Divide the gradients by the loss's scale, which is returned, and let the scale adapt."""
    if scaler is None:
        return 1.0
    scale = scaler.get_scale()
    for optimizer in optimizers:
        if optimizer:
            scaler.unscale_(optimizer)
    scaler.update()
    return scale


def set_rate(optimizer: Optimizer, factor: float, done: int = 0) -> None:
    """Set every group's rate to `factor` times the rate it was built with.

    A group with the key "since" waits until so many steps are `done`: no rate and no gradients.
    One with the key "until" stays as it is from there on.
    """
    for group in optimizer.param_groups:
        waits = done < group.get("since", 0) or done >= group.get("until", math.inf)
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * (0.0 if waits else factor)
        for parameter in group["params"] if {"since", "until"} & group.keys() else ():
            parameter.requires_grad_(not waits)


def rate(optimizer: Optimizer) -> tuple[float, float]:
    """The first group's rate in effect, and the factor `d` that adaptive optimizers put in it."""
    group = optimizer.param_groups[0]
    return _effective(group), float(group.get("d", 1.0))


def rates(optimizer: Optimizer) -> dict[str, float]:
    """The rate in effect of the groups that have a "name"; the last of those that share one."""
    named = [group for group in optimizer.param_groups if "name" in group]
    return {group["name"]: _effective(group) for group in named}


def _effective(group: Mapping[str, Any]) -> float:
    return float(group["lr"]) * float(group.get("d", 1.0))


def _clip(parameters: list[Tensor], clip: float | None, team: Team | None = None) -> float:
    """Scale the gradients to the norm `clip` at most and return the norm they had.

    Without a clip (None, 0) they stay as they are. A parameter that met no loss (the last layer of
    a text encoder read before it) gets zeros: some optimizers cannot step without a gradient. One
    that waits gets none, so that its moments begin when it does.
    """
    for parameter in parameters:
        if parameter.grad is None and parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    norm = team.norm(parameters) if team else norm_of(parameters)
    found = norm.item()
    if clip and not found < 0.999 * clip:  # else torch would multiply all of them with 1
        torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
    return found
