"""A model's networks that take turns on the device: opened when first asked for, one kind at once.

    text encoders   |   UNet   |   VAE        on the device is the kind that was asked for last

The others wait on the CPU.  Where the device is the CPU itself nothing moves, and what was opened
stays.  Training holds its networks together, and lets them leave only while a large picture is made
of latents: at 1024 pixels SDXL's VAE needs 3.2 GB for that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass

import torch
from torch import nn

Opener = Callable[[], nn.Module]
"""Reads a network from its file, onto the device."""


@dataclass(eq=False)
class Place:
    """Where one network is: not open yet, on the device, or waiting on the CPU."""

    kind: str
    opener: Opener
    module: nn.Module | None = None
    here: bool = False


class Parts(MutableMapping[str, nn.Module]):
    """Networks by name; asking for one brings it to the device and sends those of other kinds away.

    `room` holds every place on the device, also those of a model that shares networks with this.
    `together` sends none away but by `alone`.
    """

    def __init__(
        self, openers: Mapping[str, Opener], device: torch.device, together: bool = False
    ) -> None:
        self.device, self.together = device, together
        self.places = {name: Place(kind(name), opener) for name, opener in openers.items()}
        self.room = list(self.places.values())

    def __getitem__(self, name: str) -> nn.Module:
        place = self.places[name]
        if not self.together:
            self.alone(name)
        if place.module is None:
            place.module = place.opener()
        elif not place.here:
            moved(place.module, self.device)
        place.here = True
        return place.module

    def __setitem__(self, name: str, module: nn.Module) -> None:
        self.places[name] = Place(kind(name), lambda: module, module, here=True)
        self.room.append(self.places[name])

    def __delitem__(self, name: str) -> None:
        self.room.remove(self.places.pop(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def __contains__(self, name: object) -> bool:
        return name in self.places

    def alone(self, name: str) -> None:
        """Send every network of another kind away; they come back when they are asked for."""
        for place in self.room:
            if place.here and place.kind != kind(name) and self.device.type != "cpu":
                assert place.module is not None
                moved(place.module, torch.device("cpu"))
                place.here = False

    def beside(self, name: str, opener: Opener) -> Parts:
        """These networks with another one of this name; both take turns in the same room."""
        other = type(self)({}, self.device, self.together)
        place = Place(kind(name), opener)
        other.places = {**self.places, name: place}
        self.room.append(place)
        other.room = self.room
        return other


def beside(
    parts: Mapping[str, nn.Module], name: str, opener: Opener
) -> dict[str, nn.Module] | Parts:
    """A model's networks with another one of this name."""
    return parts.beside(name, opener) if isinstance(parts, Parts) else {**parts, name: opener()}


def kind(name: str) -> str:
    """Networks of one kind are used together: both text encoders, two VAEs."""
    return "text" if name.startswith("te") else name


def moved(module: nn.Module, device: torch.device) -> None:
    """Bring a network's weights to a device, bit for bit."""
    module.to(device)
