"""Features of a UNet's blocks while it answers, and what names them.

    pre_resample   what a block hands to its down- or upsampler; its output where it has none
    post_block     the block's output

A feature is (B, C, H, W) with its graph; pooled it is (B, C), or (B, 2 C) with the spread. An
assessor reads pooled features, so the fingerprint of how they were taken travels with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from recast.errors import NotFinite, Refused
from recast.objective import Objective

Where = Literal["pre_resample", "post_block"]
Pooling = Literal["mean", "mean_std"]
WHERE: tuple[Where, ...] = ("pre_resample", "post_block")
POOLINGS: tuple[Pooling, ...] = ("mean", "mean_std")


def block_names(unet: nn.Module) -> tuple[str, ...]:
    """The names of a UNet's blocks in the order they answer: down_0 …, mid, up_0 …"""
    return tuple(_blocks(unet))


class FeatureTap:
    """Takes the features of named blocks (None: all) from every forward inside a with statement.

    Raises Refused for a block that the UNet does not have, and for an unknown `where`.
    """

    def __init__(
        self, unet: nn.Module, blocks: Sequence[str] | None = None, where: str = "pre_resample"
    ) -> None:
        if where not in WHERE:
            raise Refused(f"features are taken {' or '.join(WHERE)}, not {where!r}.")
        there = _blocks(unet)
        self.blocks = tuple(there) if blocks is None else tuple(blocks)
        if absent := [name for name in self.blocks if name not in there]:
            raise Refused(
                f"the UNet has no block {', '.join(absent)}: its blocks are {', '.join(there)}."
            )
        self.where = where
        self._unet = unet
        self._places = {name: _place(*there[name], where) for name in self.blocks}
        self._channels = {name: _width(there[name][1]) for name in self.blocks}
        self._handles: list[RemovableHandle] = []
        self._taken: dict[str, Tensor] = {}

    def __enter__(self) -> FeatureTap:
        for name, (path, before) in self._places.items():
            module = self._unet.get_submodule(path)
            if before:
                handle = module.register_forward_pre_hook(self._keep_input(name))
            else:
                handle = module.register_forward_hook(self._keep_output(name))
            self._handles.append(handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._taken.clear()

    def taken(self) -> dict[str, Tensor]:
        """Hand over the last forward's features, (B, C, H, W) each, and forget them.

        Raises Refused where a block did not answer since the last call.
        """
        if missing := [name for name in self.blocks if name not in self._taken]:
            raise Refused(
                f"no features came from block {', '.join(missing)}: let the tapped UNet answer, "
                "inside the tap's with statement, before they are taken."
            )
        found = {name: self._taken[name] for name in self.blocks}
        self._taken.clear()
        return found

    def fingerprint(self, objective: Objective, pooling: str = "mean") -> dict[str, str]:
        """What must be the same of two networks for the same assessor to read both."""
        config: Mapping[str, Any] = getattr(self._unet, "config", {})
        widths = ",".join(map(str, config.get("block_out_channels", ())))
        attention = config.get("cross_attention_dim", "")
        return {
            "architecture": f"{type(self._unet).__name__} {widths} context {attention}",
            "blocks": ",".join(self.blocks),
            "modules": ",".join(path for path, _ in self._places.values()),
            "channels": ",".join(str(self._channels[name]) for name in self.blocks),
            "where": self.where,
            "pooling": pooling,
            "objective": objective.name,
            "schedule": repr(objective.path),
        }

    def _keep_input(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def keep(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            self._taken[name] = given[0]

        return keep

    def _keep_output(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def keep(module: nn.Module, given: Any, answer: Any) -> None:
            self._taken[name] = answer[0] if isinstance(answer, tuple) else answer

        return keep


def pool(features: Mapping[str, Tensor], how: str = "mean") -> dict[str, Tensor]:
    """Mean over places in fp32, (B, C); with their standard deviation behind it, (B, 2 C).

    Raises Refused where half precision has overflowed, NotFinite where full precision has.
    """
    if how not in POOLINGS:
        raise Refused(f"features are pooled by {' or '.join(POOLINGS)}, not {how!r}.")
    pooled = {name: _pooled(feature, how) for name, feature in features.items()}
    broken = [name for name, each in pooled.items() if not each.detach().isfinite().all()]
    if broken and features[broken[0]].dtype == torch.float16:
        raise Refused(
            f"the features of block {', '.join(broken)} overflow in fp16: run the network in bf16 "
            "or fp32."
        )
    if broken:
        raise NotFinite(f"the features of block {', '.join(broken)} are not finite.")
    return pooled


def _pooled(feature: Tensor, how: str) -> Tensor:
    flat = feature.float().flatten(2)
    mean = flat.mean(2)
    return mean if how == "mean" else torch.cat([mean, flat.std(2, correction=0)], 1)


def _blocks(unet: nn.Module) -> dict[str, tuple[str, nn.Module]]:
    """Block name -> (path of the module, the module)."""
    found: dict[str, tuple[str, nn.Module]] = {}
    for side in ("down", "up"):
        row = getattr(unet, f"{side}_blocks", None)
        if not isinstance(row, nn.ModuleList):
            raise Refused(f"{type(unet).__name__} has no {side} blocks to take features from.")
        found |= {f"{side}_{k}": (f"{side}_blocks.{k}", block) for k, block in enumerate(row)}
        if side == "down" and isinstance(middle := getattr(unet, "mid_block", None), nn.Module):
            found["mid"] = ("mid_block", middle)
    return found


def _place(path: str, block: nn.Module, where: str) -> tuple[str, bool]:
    """The module to watch, and whether its input is wanted rather than its output."""
    for kind in ("downsamplers", "upsamplers"):
        if where == "pre_resample" and isinstance(getattr(block, kind, None), nn.ModuleList):
            return f"{path}.{kind}.0", True
    return path, False


def _width(block: nn.Module) -> int:
    resnets = getattr(block, "resnets", None)
    if not isinstance(resnets, nn.ModuleList):
        raise Refused(f"{type(block).__name__} has no residual layers to take features from.")
    return resnets[-1].out_channels  # type: ignore[return-value]
