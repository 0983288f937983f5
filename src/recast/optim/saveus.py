"""SAVEUS: Adam on gradients that were centralised, normalised and amplified by their momentum.

    g <- g - c mean(g)                       over all axes but the first
    g <- lerp(g, g / (std(g) + 1e-8), n)     by slice of the first axis
    m <- b1 m + (1 - b1) g
    g <- g + a m
    v <- b2 v + (1 - b2) g²
    p <- p - lr / (1 - b1^t) * g / (sqrt(v) / sqrt(1 - b2^t) + eps)

The published code divides in place before it interpolates, so that what it does is n = 1 whatever
the strength asked for. `in_place` does that, and reproduces published runs; the formula is the
default. With n = 0 both leave g alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from recast.errors import Refused

TINY = 1e-8


class Saveus(Optimizer):
    """The optimizer of the published 80-step recipe.

    `clip_gradients` bounds g by t^clip_power just before the step. Moments are fp32 even where
    parameters are 16 bit: b2 = 0.999 moves nothing in bf16. Raises Refused for impossible values,
    RuntimeError for sparse gradients.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        centralization: float = 0.5,
        normalization: float = 0.5,
        normalize_channels: bool = True,
        amp_fac: float = 2.0,
        clip_power: float = 0.25,
        decouple_weight_decay: bool = False,
        clip_gradients: bool = False,
        in_place: bool = False,
    ) -> None:
        settings = {k: v for k, v in locals().items() if k not in ("self", "params", "__class__")}
        _check(settings)
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every parameter that has a gradient."""
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)
        return loss

    def _move(self, parameter: Tensor, how: dict[str, Any]) -> None:
        if parameter.grad.is_sparse:  # type: ignore[union-attr]
            raise RuntimeError("Saveus has no meaning for sparse gradients.")
        precise = torch.promote_types(parameter.dtype, torch.float32)
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"], state["exp_avg_sq"] = (
                torch.zeros_like(parameter, dtype=precise) for _ in range(2)
            )
        state["step"] += 1
        t, m, v = state["step"], state["exp_avg"], state["exp_avg_sq"]
        b1, b2 = how["betas"]
        rate = how["lr"] / (1 - b1**t)

        g = shaped(parameter.grad.to(precise), how)  # type: ignore[union-attr]
        m.lerp_(g, 1 - b1)
        g = g + how["amp_fac"] * m
        v.mul_(b2).addcmul_(g, g, value=1 - b2)
        denominator = v.sqrt().div_((1 - b2**t) ** 0.5).add_(how["eps"])

        p = parameter.to(precise)
        if how["decouple_weight_decay"]:
            p = p * (1 - rate * how["weight_decay"])
        else:
            g = g + how["weight_decay"] * p
        if how["clip_gradients"]:
            bound = t ** how["clip_power"]
            g = g.clamp(-bound, bound)
        parameter.copy_(p - rate * g / denominator)


def shaped(g: Tensor, how: dict[str, Any]) -> Tensor:
    """A gradient centralised and normalised.

    A tensor of one axis is centralised by its own mean: no axis but the first is left. Slices of
    one number have no deviation; such a tensor is normalised as a whole, if it has more than two.
    """
    rest = tuple(range(1, g.ndim)) or None
    g = g - how["centralization"] * g.mean(rest, keepdim=True)
    strength = float(how["normalization"] > 0) if how["in_place"] else how["normalization"]
    if rest and how["normalize_channels"] and g[0].numel() > 1:
        return torch.lerp(g, g / (g.std(rest, keepdim=True) + TINY), strength)
    if g.numel() > 2:
        return torch.lerp(g, g / (g.std() + TINY), strength)
    return g


def _check(settings: dict[str, Any]) -> None:
    """Refuse values outside their meaning, named."""
    for key in ("eps", "weight_decay", "amp_fac", "clip_power"):
        if not settings[key] >= 0:
            raise Refused(f"optimizer saveus: {key} is {settings[key]}; give 0 or more.")
    for key in ("centralization", "normalization"):
        if not 0 <= settings[key] <= 1:
            raise Refused(f"optimizer saveus: {key} is {settings[key]}; give a number from 0 to 1.")
    betas = settings["betas"]
    if len(betas) != 2 or not all(0 <= b < 1 for b in betas):
        raise Refused(f"optimizer saveus: betas is {betas}; give two numbers from 0 to below 1.")
