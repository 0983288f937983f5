"""A model with an adapter in its weights, of which any blocks can be taken out and put back."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recast.adapter import Adapter
from recast.adapter.places import Place, places
from recast.lowrank import Full, LowRank
from recast.model import Model


@dataclass(frozen=True)
class Slot:
    """One parameter of a model, its original value on the CPU, and the change for it."""

    parameter: nn.Parameter
    original: Tensor
    entry: LowRank | Full


class Mix:
    """W + dW for the groups that are on, W for the others; begins as the original.

    group_of: the group of each entry by its module. Raises Refused for an adapter of another model.
    """

    def __init__(self, model: Model, adapter: Adapter, group_of: Mapping[str, str]) -> None:
        self._slots: dict[str, list[Slot]] = {}
        self._on: frozenset[str] = frozenset()
        found = places(model.checkpoint, adapter.entries)
        for place in (place for several in found.values() for place in several):
            group = group_of[place.name.rpartition(".")[0]]
            slot = _slot(model, place, adapter.entries[place.name])
            self._slots.setdefault(group, []).append(slot)

    @torch.no_grad()
    def set(self, groups: Collection[str]) -> None:
        """Put exactly these groups on; only what changes is written."""
        wanted = frozenset(groups)
        for group in sorted(wanted ^ self._on):
            for slot in self._slots.get(group, ()):
                value = slot.original
                if group in wanted:
                    value = (value.float() + slot.entry.dense(value.shape)).to(value.dtype)
                slot.parameter.copy_(value)
        self._on = wanted


def _slot(model: Model, place: Place, entry: LowRank | Full) -> Slot:
    owner = model.part(place.site.part).get_submodule(place.site.module)
    parameter = getattr(owner, place.site.param)
    return Slot(parameter, parameter.detach().to("cpu", copy=True), entry)
