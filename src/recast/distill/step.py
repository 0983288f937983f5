"""What goes into a step of distillation and what comes out of it; see `loop`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from recast.distill.losses import KD_WEIGHT
from recast.objective import Net, Objective

USUAL_WEIGHT = 0.05
WANTED_RATIO = 0.1  # of the block term to the flow term, by which `auto` sets the weight


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


class Team(Protocol):
    """Processes that take a step together; see recast.train.team."""

    @property
    def count(self) -> int: ...
    def take(self, parameters: Iterable[Tensor]) -> None: ...
    def give(self, parameters: Iterable[Tensor]) -> None: ...
    def woven(self, mine: list[Any]) -> list[Any]: ...


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
