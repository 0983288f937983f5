"""Which blocks of an adapter make its pictures: each kept alone, each left out, same noise.

    kept(S) = 1 - |P_S - P_all|^2 / |P_none - P_all|^2     1: the whole adapter's picture, 0: as far
                                                          from it as the model's own
    likeness(S) = SSIM(P_S, P_all)                         mean over the prompts

The suggestion is greedy: blocks are added in the order of the harm that leaving them out does,
until the share asked for is kept; then each is tried without, the largest first, and stays out
where the share holds. Every set tried is painted, so that what is stated was seen; a smaller set
may exist. The share and not the likeness decides, because a likeness may be high without any block.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from recast.adapter import Adapter
from recast.errors import Refused
from recast.evaluate.agreement import agreement
from recast.events import Event, Stage, Tick
from recast.model import Model
from recast.sample import sample_images
from recast.surgery.contents import Held
from recast.surgery.mix import Mix


@dataclass(frozen=True)
class Setting:
    """What is painted for every set of blocks, and the share of the change to keep."""

    prompts: tuple[str, ...]
    seed: int = 0
    steps: int = 12
    scale: float = 3.0
    size: tuple[int, int] | None = None
    kept: float = 0.9


@dataclass(frozen=True)
class Seen:
    """The pictures of one set of blocks, (3, H, W) in [-1, 1] a prompt, and their scores."""

    pictures: tuple[Tensor, ...]
    likeness: float
    kept: float


@dataclass(frozen=True)
class Group:
    """What is ticked as one: a block of the UNet, or a whole text encoder."""

    name: str
    blocks: tuple[str, ...]
    modules: tuple[Held, ...]

    @property
    def bytes(self) -> int:
        """Of its tensors."""
        return sum(module.bytes for module in self.modules)


@dataclass
class Explored:
    """Everything seen: without and with the adapter, each group alone and left out."""

    setting: Setting
    groups: tuple[Group, ...]
    none: Seen
    whole: Seen
    alone: dict[str, Seen] = field(default_factory=dict)
    without: dict[str, Seen] = field(default_factory=dict)
    chosen: tuple[str, ...] = ()
    chosen_seen: Seen | None = None


def groups_of(modules: Sequence[Held]) -> tuple[Group, ...]:
    """The groups of an adapter in the order of the network."""
    found: dict[str, list[Held]] = {}
    for module in modules:
        name = module.spot.block if module.spot.part == "unet" else module.spot.part.upper()
        found.setdefault(name, []).append(module)
    return tuple(
        Group(name, tuple(dict.fromkeys(m.spot.block for m in mine)), tuple(mine))
        for name, mine in found.items()
    )


def explore(
    model: Model,
    adapter: Adapter,
    groups: tuple[Group, ...],
    setting: Setting,
    into: list[Explored],
) -> Iterator[Event]:
    """Paint every group alone and left out, then look for a small set; appends what was seen.

    Raises Refused for an adapter of another model and for one that changes no picture.
    """
    group_of = {module.spot.lora: group.name for group in groups for module in group.modules}
    mix = Mix(model, adapter, group_of)
    names = [group.name for group in groups]
    yield Stage("explore", 2 * len(names) + 2, "sets of blocks")
    none = _painted(model, mix, (), setting)
    whole = _painted(model, mix, names, setting)
    if not _gap(none, whole):
        raise Refused(
            "the adapter changes no pixel of these pictures: give prompts that it was trained on, "
            "and the model it was made for."
        )
    seen = Explored(setting, groups, _scored(none, none, whole), _scored(whole, none, whole))
    done = 2
    yield Tick(done)
    for name in names:
        rest = [other for other in names if other != name]
        for found, kept in ((seen.alone, [name]), (seen.without, rest)):
            found[name] = _scored(_painted(model, mix, kept, setting), none, whole)
            done += 1
            yield Tick(done)
    yield from _suggest(model, mix, seen)
    mix.set(())
    into.append(seen)


def _suggest(model: Model, mix: Mix, seen: Explored) -> Iterator[Event]:
    """Add groups by harm until the share is kept, then take out what is not needed."""
    none, whole, setting = seen.none.pictures, seen.whole.pictures, seen.setting
    size = {group.name: group.bytes for group in seen.groups}
    order = sorted(size, key=lambda name: seen.without[name].kept)
    yield Stage("choose", 2 * len(order), "sets of blocks")
    chosen, best, done = [], seen.none, 0
    for name in order:
        if best.kept >= setting.kept:
            break
        chosen.append(name)
        best = _scored(_painted(model, mix, chosen, setting), none, whole)
        done += 1
        yield Tick(done)
    for name in sorted(chosen, key=lambda name: -size[name]):
        fewer = [other for other in chosen if other != name]
        tried = _scored(_painted(model, mix, fewer, setting), none, whole)
        if tried.kept >= setting.kept:
            chosen, best = fewer, tried
        done += 1
        yield Tick(done)
    yield Tick(2 * len(order))
    seen.chosen = tuple(name for name in size if name in chosen)
    seen.chosen_seen = best


def _painted(
    model: Model, mix: Mix, groups: Collection[str], setting: Setting
) -> tuple[Tensor, ...]:
    mix.set(groups)
    count = len(setting.prompts)
    pictures = sample_images(
        model, setting.prompts, seeds=[setting.seed + k for k in range(count)],
        steps=setting.steps, scale=setting.scale, size=setting.size,
    )  # fmt: skip
    return tuple(picture.image for picture in pictures)


def _scored(
    pictures: tuple[Tensor, ...], none: tuple[Tensor, ...], whole: tuple[Tensor, ...]
) -> Seen:
    kept = 1 - _gap(pictures, whole) / _gap(none, whole)
    return Seen(pictures, agreement(whole, pictures).ssim, kept)


def _gap(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> float:
    """Mean squared difference."""
    each = [(a - b).double().square().mean() for a, b in zip(one, other, strict=True)]
    return torch.stack(each).mean().item()
