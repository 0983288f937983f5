"""One arm of bench/train as a process: builds its network, then takes a step whenever it is told.

    stdin  step       one step; answers its CPU and wall seconds
           memory     one step with every tensor counted; answers what was alive at once
           end        leaves

Recast's arm is its own loop on its own layers. The peers' is the loop of diffusers' LoRA script:
the library's layers in diffusers' UNet, the mean squared error, the clip at 1, AdamW. All see the
same draws, eps as the objective, and begin with `up` at zero.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from size import Generated

from recast.adapter import attach
from recast.adapter.file import Adapter
from recast.checkpoint import Checkpoint
from recast.layout import Site
from recast.layout.blueprint import Plan, TextPlan, UNetPlan
from recast.lowrank import LowRank
from recast.model import Model, open_model
from recast.objective import OBJECTIVES

if TYPE_CHECKING:
    from recast.train import Draw

QUARTER = Plan(  # 80 and 160 would be no widths for group norms of 32 groups
    "sdxl",
    UNetPlan((96, 160, 320), (0, 2, 10), 10, 512, 704, linear=True),
    None,
    TextPlan(192, 2, 768),
    TextPlan(320, 2, 1280, projection=320),
)
RANKS = {"pocket": 16, "quarter": 16}
SIDES = {"pocket": 8, "quarter": 64}  # of the latents
BATCHES = {"pocket": 4, "quarter": 1}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RATE = 1e-4
Stepper = Iterator[object]


def opened(world: str, dtype: str, device: str) -> Model:
    """The UNet of a world, frozen."""
    if world == "pocket":
        from recast import pocket

        return open_model(
            pocket.path("pocket-xl"), dtype=DTYPES[dtype], device=device, parts=("unet",)
        )
    store: Any = Generated(QUARTER)
    checkpoint = Checkpoint(store.path, store=store)
    return open_model(
        checkpoint, dtype=DTYPES[dtype], device=device, parts=("unet",), objective="eps"
    )


def chosen(model: Model, network: str) -> list[Site]:
    """The layers that get factors: every one of kohya's with convolutions, or the linear ones."""
    every = model.layout.sites("kohya-conv")
    return [site for site in every if network == "locon" or site.kind == "linear"]


def a_draw(model: Model, world: str) -> Draw:
    """The same random latents for every arm, noised, under a random condition."""
    from recast.text.encode import Condition
    from recast.train import noised

    count, side, plan = BATCHES[world], SIDES[world], model.layout.plan
    source = torch.Generator().manual_seed(0)
    latents, eps = torch.randn(2, count, 4, side, side, generator=source).to(model.device)
    pooled = plan.te2.projection if plan.te2 else None
    sizes = torch.tensor([[8.0 * side, 8.0 * side, 0, 0, 8.0 * side, 8.0 * side]] * count)
    condition = Condition(
        torch.randn(count, 77, plan.unet.context, generator=source),
        torch.randn(count, pooled, generator=source) if pooled else None,
        sizes,
    )
    t = torch.linspace(0.2, 0.8, count, device=model.device)
    return noised(OBJECTIVES["eps"], latents, t, eps, condition.to(model.device))


def recast(model: Model, sites: list[Site], rank: int, draw: Draw) -> tuple[Stepper, list]:
    """Our loop on our layers, with the factors of a plain LoRA."""
    from recast.adapter import entry_name
    from recast.optim import build
    from recast.train import criterion, from_data, train

    objective = OBJECTIVES["eps"]
    entries = {entry_name(site): zero(site, rank) for site in sites}
    attached = attach({"unet": model.unet}, Adapter(entries, {"recast.role": "delta"}), sites)
    masters = attached.parameters()
    loss = criterion(from_data(objective), objective)

    def net(draw: Draw) -> torch.Tensor:
        return model.net(draw.condition, objective)(draw.x, draw.t)

    return train(net, repeat(draw), loss, build("adamw", masters, lr=RATE)), masters


def zero(site: Site, rank: int) -> LowRank:
    """Factors that change nothing yet, drawn as the peers draw theirs."""
    out, into, *kernel = site.shape
    down = torch.empty(rank, into, *kernel)
    torch.nn.init.kaiming_uniform_(down, a=5**0.5)
    return LowRank(torch.zeros(out, rank), down)


def peft(model: Model, sites: list[Site], rank: int, draw: Draw) -> tuple[Stepper, list]:
    """PEFT's layers, put in as diffusers' `add_adapter` does."""
    from peft import LoraConfig

    names = sorted({site.module for site in sites})
    model.unet.add_adapter(  # type: ignore[operator]
        LoraConfig(r=rank, lora_alpha=rank, target_modules=names, init_lora_weights=True)
    )
    masters = [p for p in model.unet.parameters() if p.requires_grad]
    for master in masters:
        master.data = master.data.float()  # diffusers' cast_training_params
    return plain(model, masters, draw), masters


def lycoris(model: Model, sites: list[Site], rank: int, draw: Draw) -> tuple[Stepper, list]:
    """LyCORIS' LoCon, as its README puts it round a network."""
    import logging

    from lycoris import LycorisNetwork, create_lycoris

    logging.disable(logging.INFO)
    names = {site.module for site in sites}
    LycorisNetwork.apply_preset(
        {"target_module": [], "target_name": [re.escape(name) for name in names]}
    )
    wrapped = create_lycoris(
        model.unet, 1.0, linear_dim=rank, linear_alpha=rank, conv_dim=rank, conv_alpha=rank,
        algo="locon",
    )  # fmt: skip
    wrapped.apply_to()
    wrapped.to(model.device)
    masters = [p for p in wrapped.parameters() if p.requires_grad]
    return plain(model, masters, draw), masters


def plain(model: Model, masters: list, draw: Draw) -> Stepper:
    """The loop of diffusers' script: loss, backward, clip, step."""
    optimizer = torch.optim.AdamW(masters, lr=RATE)
    net = model.net(draw.condition)
    cast = model.device.type if model.dtype != torch.float32 else None
    while True:
        with torch.autocast(cast or "cpu", model.dtype, enabled=cast is not None):
            answer = net(draw.x, draw.t)
        loss = torch.nn.functional.mse_loss(answer.float(), draw.eps.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


ARMS: dict[str, Callable[..., tuple[Stepper, list]]] = {
    "recast": recast, "peft": peft, "lycoris": lycoris,
}  # fmt: skip


def serve(arm: str, world: str, network: str, checkpointing: str, dtype: str, threads: str) -> None:
    """Build the arm and answer until told to end."""
    from _live import Live

    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    model = opened(world, dtype, "cpu")
    sites = chosen(model, network)
    if checkpointing == "on":
        model.unet.enable_gradient_checkpointing()  # type: ignore[operator]
    steps, masters = ARMS[arm](model, sites, RANKS[world], a_draw(model, world))
    expected = sum(p.numel() for site in sites for p in vars(zero(site, RANKS[world])).values())
    trained = sum(p.numel() for p in masters)
    if trained != expected:
        raise SystemExit(f"{arm} trains {trained} numbers, and {expected} were asked for")
    next(steps)
    answer({"trained": trained, "layers": len(sites)})
    for line in sys.stdin:
        if line.strip() == "step":
            began, wall = time.process_time(), time.perf_counter()
            next(steps)
            answer({"cpu": time.process_time() - began, "wall": time.perf_counter() - wall})
        elif line.strip() == "memory":
            live = Live()
            with live:
                next(steps)
            answer({"alive": live.peak})
        else:
            return


def answer(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    serve(*sys.argv[1:])
