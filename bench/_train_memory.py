"""What a training step of real SDXL and SD 1.5 will hold, traced on the meta device.

Forward and backward are run as they are, on tensors that have shapes and no numbers;
every tensor an operation makes is counted from its making to its end. Attention is the fused one
of a GPU: it keeps queries, keys, values, its answer and one number a row and head, no matrix.
Weights, masters, gradients and moments are counted as they are held. What a GPU's kernels need
while they run, its context and the allocator's rounding are not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from _live import Live
from _train_arms import QUARTER, zero
from size import Generated
from torch import Tensor
from torch.nn import functional as F

from recast.adapter import attach, entry_name
from recast.adapter.file import Adapter
from recast.checkpoint import Checkpoint
from recast.layout import SD15, SDXL
from recast.layout.blueprint import Plan
from recast.model import Model, open_model
from recast.objective import OBJECTIVES
from recast.train import noised

PLANS = {"sdxl": SDXL, "sd15": SD15, "quarter": QUARTER}
SIDES = {"sdxl": 1024, "sd15": 512}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# family, rank, side, batch, dtype, recomputed, text encoders trained
TABLE = [
    ("sdxl", 64, 1024, 1, "bf16", True, True),
    ("sdxl", 64, 1024, 1, "bf16", True, False),
    ("sdxl", 64, 1024, 1, "bf16", False, False),
    ("sdxl", 16, 1024, 1, "bf16", True, False),
    ("sdxl", 16, 1024, 4, "bf16", True, False),
    ("sdxl", 64, 768, 1, "bf16", True, False),
    ("sdxl", 64, 1024, 1, "fp32", True, False),
    ("sd15", 64, 512, 1, "bf16", True, True),
    ("sd15", 64, 512, 1, "bf16", True, False),
    ("sd15", 64, 512, 1, "bf16", False, False),
    ("sd15", 16, 512, 4, "bf16", True, False),
    ("sd15", 64, 768, 1, "bf16", True, False),
    ("sd15", 64, 512, 1, "fp32", True, False),
]


class Empty(Generated):
    """A checkpoint of shapes: its bytes are all zero and cost nothing to make."""

    def raw(self, key: str) -> bytearray:
        spec = self.specs[key]
        return bytearray(spec.end - spec.start)


class Flash(torch.autograd.Function):
    """Fused attention as far as memory goes."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, rows = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, rows)
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


@contextmanager
def fused_attention() -> Iterator[None]:
    """Inside, attention is `Flash`."""
    before = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda q, k, v, *_, **__: Flash.apply(q, k, v)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = before


@lru_cache(maxsize=1)
def opened(plan: Plan, dtype: str, texts: bool, device: str) -> Model:
    """The networks that the step needs."""
    store: Any = Empty(plan) if device == "meta" else Generated(plan)
    checkpoint = Checkpoint(store.path, store=store)
    names = [name for name in ("te1", "te2") if texts and getattr(plan, name)]
    return open_model(
        checkpoint, dtype=DTYPES[dtype], device=device, parts=("unet", *names), objective="eps"
    )


def held(model: Model, masters: list[Tensor]) -> int:
    """Bytes of frozen weights, and of masters and AdamW's moments."""
    frozen = {p for part in model.parts.values() for p in part.parameters() if not p.requires_grad}
    return sum(p.nbytes for p in frozen) + 3 * sum(p.nbytes for p in masters)


def step(
    plan: Plan, rank: int, side: int, batch: int, dtype: str, recomputed: bool, texts: bool,
    device: str = "meta",
) -> dict[str, int]:  # fmt: skip
    """Bytes of one step, traced on the meta device or counted in a real one."""
    from recast.convert.running import forgo, recompute

    model = opened(plan, dtype, texts, device)
    profile = "kohya-conv" + (",te1" + (",te2" if plan.te2 else "") if texts else "")
    sites = model.layout.sites(profile)
    entries = {entry_name(site): zero(site, rank) for site in sites}
    parts = {name: part for name, part in model.parts.items() if name != "vae"}
    attached = attach(parts, Adapter(entries, {"recast.role": "delta"}), sites)
    for part in parts.values():
        recompute(part) if recomputed else forgo(part)
    masters = attached.parameters()
    objective = OBJECTIVES["eps"]
    draw = a_draw(model, plan, side, batch)

    def net(each: Any) -> Tensor:
        condition = model.condition(["a"] * batch, size=side) if texts else each.condition
        return model.net(condition, objective)(each.x, each.t)

    live = Live()
    with live, fused_attention() if device == "meta" else nullcontext():
        F.mse_loss(net(draw), draw.eps).backward()
    found = {
        "held": held(model, masters), "alive": live.peak,
        "trained": sum(p.numel() for p in masters),
    }  # fmt: skip
    attached.detach()
    return found


def a_draw(model: Model, plan: Plan, side: int, batch: int) -> Any:
    """Latents and a condition of the right shapes."""
    from recast.text.encode import Condition

    device = model.device
    made = torch.randn(2, batch, 4, side // 8, side // 8, device=device)
    pooled = plan.te2.projection if plan.te2 else None
    condition = Condition(
        torch.randn(batch, 77, plan.unet.context, device=device),
        torch.randn(batch, pooled, device=device) if pooled else None,
        torch.randn(batch, 6, device=device) if pooled else None,
    )
    half = torch.full((batch,), 0.5, device=device)
    return noised(OBJECTIVES["eps"], made[0], half, made[1], condition)


def predicted() -> Iterator[dict[str, Any]]:
    """The rows of the table."""
    for family, rank, side, batch, dtype, recomputed, texts in TABLE:
        found = step(PLANS[family], rank, side, batch, dtype, recomputed, texts)
        yield {
            "family": family, "rank": rank, "side": side, "batch": batch, "dtype": dtype,
            "recomputed": recomputed, "texts": texts, **found,
            "total": found["held"] + found["alive"],
        }  # fmt: skip


def checked() -> Iterator[dict[str, Any]]:
    """The same trace at a quarter of SDXL's width, beside a real step's count on this machine."""
    for side, recomputed in ((256, False), (256, True), (512, True)):
        about = (QUARTER, 16, side, 1, "fp32", recomputed, False)
        yield {
            "side": side, "recomputed": recomputed,
            "traced": step(*about)["alive"], "counted": step(*about, device="cpu")["alive"],
        }  # fmt: skip
