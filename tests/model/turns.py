"""A device that is not there: networks take turns on it, and none computes while it is away."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from recast.model import parts
from recast.model.parts import Parts


@dataclass
class Turns:
    """What was on the device each time a network was asked for: {part: dtype}, and its bytes.

    `moves` are (part's class, device) in the order they happened.
    """

    here: list[dict[str, torch.dtype]] = field(default_factory=list)
    nbytes: list[int] = field(default_factory=list)
    moves: list[tuple[str, str]] = field(default_factory=list)

    @property
    def together(self) -> set[frozenset[str]]:
        """Every set of parts that was on the device at once."""
        return {frozenset(seen) for seen in self.here}


def watch(monkeypatch: pytest.MonkeyPatch) -> Turns:
    """Let lazily opened networks believe in a GPU; weights stay where they are."""
    found = Turns()

    class Watched(Parts):
        def __getitem__(self, name: str) -> nn.Module:
            module = super().__getitem__(name)
            names = {id(place): key for key, place in self.places.items()}
            here = {
                names.get(id(place), place.kind): place.module for place in self.room if place.here
            }
            weights = {key: list(each.parameters()) for key, each in here.items() if each}
            found.here.append({key: own[0].dtype for key, own in weights.items()})
            found.nbytes.append(sum(p.nbytes for own in weights.values() for p in own))
            return module

    def lazy(
        openers: Mapping[str, Callable[[], nn.Module]], device: torch.device, together: bool
    ) -> Parts:
        return Watched(openers, torch.device("cuda"), together)

    def moved(module: nn.Module, device: torch.device) -> None:
        found.moves.append((type(module).__name__, device.type))
        for child in module.modules():
            if device.type == "cpu":
                child.forward = away
            else:
                del child.forward

    monkeypatch.setattr("recast.model.load.Parts", lazy)
    monkeypatch.setattr(parts, "moved", moved)
    return found


def away(*given: Any, **named: Any) -> None:
    raise AssertionError("this network is not on the device")
