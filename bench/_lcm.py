"""Latent consistency distillation of a LoRA (Luo et al. 2023), and the sampler that goes with it.

    f(x, t) = c_skip x + c_out x0_hat(x, t)      c_skip = s / (k k + s)   c_out = k / sqrt(k k + s)
    loss    = |f(x_t, t) - f'(x_u, u)|           k = 10 * (1000 t), s = 0.25, u the next time

x_u is a DDIM step of the guided original from x_t, f' is f without gradient; f(x, 0) = x. Distances
are pseudo-Huber (c 0.001).
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from recast.adapter import Adapter
    from recast.model import Model
    from recast.objective import Net, Objective
    from recast.objective import Path as Levels
    from recast.sample.guidance import Denoiser

SITES = "principal"
GRID = 16  # DDIM steps of the distillation
GUIDANCE = 3.0
RANK = 16
DREAMS = 256
BATCH = 16
RATE = 1e-3
C = 0.001


def distil(model: Model, start: Adapter, steps: int, pairs: Path) -> Adapter:
    """Train a LoRA so that one step from anywhere ends where the guided original would."""
    from recast.adapter import attach
    from recast.optim import build
    from recast.train import SCHEDULES

    x0, prompts = dreamt(model, pairs)
    with torch.no_grad():
        conditions, null = model.condition(prompts), model.condition([""])
    attached = attach({"unet": model.unet}, start, model.layout.sites(SITES))
    optimizer = build("adamw", attached.parameters(), lr=RATE)
    fading = SCHEDULES["linear"](steps)
    for step in range(steps):
        source = torch.Generator().manual_seed(step)
        rows = torch.randint(len(x0), (BATCH,), generator=source)
        eps = torch.randn(BATCH, *x0.shape[1:], generator=source)
        n = (torch.randperm(GRID, generator=source) + 1)[:BATCH]
        student, bare = model.net(conditions[rows.tolist()]), model.net(null)

        def teacher(x: Tensor, t: Tensor, student: Net = student, bare: Net = bare) -> Tensor:
            with attached.teacher():
                return torch.lerp(bare(x, t), student(x, t), GUIDANCE)

        loss = consistency(student, teacher, model.objective, x0[rows], eps, n)
        optimizer.param_groups[0]["lr"] = RATE * fading(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(attached.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}: {loss.item():.4f}", flush=True)
    trained = attached.trained()
    attached.detach()
    return trained


def consistency(
    student: Net, teacher: Net, objective: Objective, x0: Tensor, eps: Tensor, n: Tensor
) -> Tensor:
    """The loss of one batch, n the points of the grid that its samples are noised to."""
    from recast.objective import levels

    t, s = n.double() / GRID, (n.double() - 1) / GRID
    x = objective.noise(x0, eps, t)
    found = bounded(student, objective, x, t)
    with torch.no_grad():
        clean, noise = objective.split(x, teacher(x, t), t)
        alpha, sigma = levels(objective.path, s, x)
        ahead = alpha * clean + sigma * noise
        wanted = bounded(student, objective, ahead, s)
    return ((found - wanted).square() + C * C).sqrt().sub(C).mean()


def bounded(net: Net, objective: Objective, x: Tensor, t: Tensor) -> Tensor:
    """f(x, t), which is x itself at t = 0."""
    k = (10_000 * t).view(-1, 1, 1, 1).to(x)
    guess, _ = objective.split(x, net(x, t.clamp(min=1e-3)), t.clamp(min=1e-3))
    return 0.25 / (k * k + 0.25) * x + k / (k * k + 0.25).sqrt() * guess


def fresh(model: Model, without: Container[str] = ()) -> Adapter:
    """A LoRA that changes nothing yet: up is 0, down small and random; no entries of `without`."""
    from recast.adapter import Adapter, entry_name
    from recast.lowrank import LowRank

    source = torch.Generator().manual_seed(0)
    entries = {}
    for site in model.layout.sites(SITES):
        if entry_name(site) in without:
            continue
        rank = min(RANK, site.shape[0])
        inner = site.shape[1:]
        down = torch.randn(rank, *inner, generator=source) / math.prod(inner) ** 0.5
        entries[entry_name(site)] = LowRank(torch.zeros(site.shape[0], rank), down)
    sha = model.checkpoint.sha256()
    return Adapter(entries, {"recast.role": "delta", "recast.base_sha256": sha})


def dreamt(model: Model, folder: Path) -> tuple[Tensor, list[str]]:
    """Latents of pictures that pocket-xl made itself, guided, and their prompts."""
    from recast.dream import Plan, dream, read_shards
    from recast.wishes import prompts_for

    plan = Plan(prompts_for(None, model.checkpoint), DREAMS, steps=20, objective="eps")
    for _ in dream(model, folder, plan):
        pass
    shards = read_shards(folder, plan, model.checkpoint.sha256())
    found, prompts = [], []
    for shard in shards:
        u = torch.lerp(shard.u_null[-1].float(), shard.u[-1].float(), GUIDANCE)
        found.append(shard.x[-1].float() - shard.t[-1].float() * u)
        prompts += shard.prompts
    return torch.cat(found), prompts


def lcm(
    denoise: Denoiser,
    path: Levels,
    x: Tensor,
    times: Tensor,
    *,
    generator: list[torch.Generator],
) -> Iterator[Tensor]:
    """Take x0 and noise it anew, one level lower each time (Luo et al. 2023, algorithm 3)."""
    from recast.sample.solvers import noise, steps

    for here, there in steps(path, times):
        x0, _ = denoise(x, here.at(x))
        x = there.alpha * x0
        if there.sigma > 0:
            x = x + there.sigma * noise(x, generator)
        yield x
