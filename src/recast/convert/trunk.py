"""One pass through the trunk for teacher and student, where both are shown the same.

Between objectives on one path (eps and v) the original and the network that learns see the same
input at the same clock, and differ from the first trained layer on. If that lies in the last up
block, what the teacher's pass brings to its door is what the student's would:

    teacher   trunk -> last up block -> output layers
    student           (the same trunk) -> last up block' -> output layers'
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from recast.objective import Objective

if TYPE_CHECKING:
    from recast.adapter import Attached

OUTPUT = ("conv_norm_out", "conv_act", "conv_out")


@dataclass(frozen=True)
class Passed:
    """What reached the last up block when the network was asked for x under a condition."""

    x: Tensor
    condition: object
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class Trunk:
    """Remembers the teacher's last pass, for one answer of the student."""

    def __init__(self, unet: nn.Module) -> None:
        self.block = unet.get_submodule("up_blocks")[-1]  # type: ignore[index]
        self.unet = unet
        self.passed: Passed | None = None

    @contextmanager
    def recorded(self, x: Tensor, condition: object) -> Iterator[None]:
        """Inside, remember what the last up block is given."""

        def keep(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.passed = Passed(x, condition, args, kwargs)

        hook = self.block.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def answer(self, x: Tensor, condition: object) -> Tensor | None:
        """The network's output from the last up block on, once; None without a pass at this x."""
        passed, self.passed = self.passed, None
        if passed is None or passed.x is not x or passed.condition is not condition:
            return None
        out = self.block(*passed.args, **passed.kwargs)
        for name in OUTPUT:
            layer = getattr(self.unet, name)  # a model without a last norm has None in its place
            out = out if layer is None else layer(out)
        return out.to(x.dtype)


def shared(
    unet: nn.Module, attached: Attached, source: Objective, objective: Objective
) -> Trunk | None:
    """A trunk to share, None where paths differ or anything before the last up block changes."""
    if source.path != objective.path:
        return None
    ends = [unet.get_submodule("up_blocks")[-1]]  # type: ignore[index]
    ends += [getattr(unet, name) for name in OUTPUT]
    late = {id(module) for end in ends if end is not None for module in end.modules()}
    return Trunk(unet) if all(id(spot.layer) in late for spot in attached.spots) else None
