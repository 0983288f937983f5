"""Put an adapter into living modules, with the original network still inside as the teacher.

Low-rank entries become a LoCon layer round the untouched base layer, full entries a
parametrization:

    student(x) = base(x) + (B - B0) A x + B0 (A - A0) x        teacher(x) = base(x)
    student(x) = base(x) + s B A x, from zero                  teacher(x) = base(x)
    student    : weight + delta                                teacher    : weight

The initial factors B0 A0 stay in the layer and the original weight stays as it is. This costs a
second copy of the small factors, where the usual PiSSA layer keeps a residual R = W - B0 A0 and
computes R x + B A x. It buys three things: the teacher's output, and that of an untrained student,
are the checkpoint's bit for bit (a 16-bit residual gives back 84 % of the weights); the difference
of the factors is taken in fp32 *before* it is rounded to a bf16 trunk's dtype, so that small
updates are not swallowed; dropout touches only what was learnt, never the principal weights. The
gradients with respect to B and A are those of PiSSA.

A quantised base (see recast.quantise) does hold the residual, Q(R); its base(x) is Q(R) x + B0 A0 x
and all else is the same, so that the student's answer is Q(R) x + B A x with exact factors.

Everything but the masters is frozen. Layers before the first attached one therefore keep no
activations for the backward pass: autograd has no reason to.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from recast.adapter.file import Adapter, trained_metadata
from recast.adapter.layers import NONE, Delta, Dropouts, LoCon, Switch
from recast.adapter.places import entry_name
from recast.adapter.rebuild import check_pair
from recast.adapter.routes import lengthen, shorten
from recast.errors import Refused
from recast.layout import Site
from recast.lowrank import Full, LowRank
from recast.quantise import Quantised, Quantiser


@dataclass(frozen=True)
class Spot:
    """Where one entry sits: the module that owned the parameter, and the layer put there."""

    name: str
    owner: nn.Module
    attribute: str
    layer: LoCon | Delta
    shape: tuple[int, ...]


@dataclass
class Attached:
    """An adapter inside a network; `detach` takes it out again."""

    initial: Adapter
    spots: list[Spot]
    switch: Switch
    frozen: list[tuple[nn.Parameter, bool]] = field(repr=False)
    held: frozenset[str] = frozenset()
    begun: Adapter | None = None
    routes: list[nn.Module] = field(default_factory=list, repr=False)

    def restart(self) -> None:
        """Set the masters to what they were when they were attached."""
        self.load(self.initial if self.begun is None else self.begun)

    def hold(self, names: Iterable[str]) -> None:
        """Keep entries as they are: they act, but are not among what is trained."""
        self.held = frozenset(names)
        for spot in self.spots:
            if spot.name in self.held:
                spot.layer.requires_grad_(False)

    def named(self) -> dict[str, nn.Parameter]:
        """Masters that are trained, by their names in the adapter file, in the sites' order."""
        found: dict[str, nn.Parameter] = {}
        for spot in self.spots:
            if spot.name in self.held:
                continue
            lora, param = spot.name.rsplit(".", 1)
            if isinstance(spot.layer, LoCon):
                found[f"{lora}.lora_up.weight"] = spot.layer.up
                found[f"{lora}.lora_down.weight"] = spot.layer.down
            else:
                found[f"{lora}.diff" if param == "weight" else f"{lora}.diff_b"] = spot.layer.delta
        return found

    def parameters(self) -> list[nn.Parameter]:
        """Masters that are trained, always in the same order."""
        return list(self.named().values())

    @contextmanager
    def teacher(self) -> Iterator[None]:
        """Inside, the network is the original checkpoint's, bit for bit, and without gradients."""
        before = self.switch.student
        self.switch.student = False
        try:
            with torch.no_grad():
                yield
        finally:
            self.switch.student = before

    def trained(self) -> Adapter:
        """A copy of the masters on the CPU, in fp32, scales multiplied out, marked as trained."""
        entries = {spot.name: _value(spot.layer, spot.shape) for spot in self.spots}
        return Adapter(entries, trained_metadata(self.initial.metadata))

    @torch.no_grad()
    def load(self, adapter: Adapter) -> None:
        """Overwrite the masters with an adapter of the same names and shapes."""
        _same_names(self.initial, adapter)
        for spot in self.spots:
            entry, layer = adapter.entries[spot.name], spot.layer
            if isinstance(layer, LoCon) and isinstance(entry, LowRank):
                up = entry.up if layer.scale == 1 else entry.up / layer.scale
                pairs = [(layer.up, up), (layer.down, entry.down)]
            elif isinstance(layer, Delta) and isinstance(entry, Full):
                pairs = [(layer.delta, entry.delta)]
            else:
                raise Refused(
                    f"{spot.name} is low-rank in one adapter and full in the other; "
                    "load an adapter made from the same split."
                )
            for master, value in pairs:
                if master.shape != value.shape:
                    raise Refused(
                        f"{spot.name} has shape {tuple(value.shape)} where "
                        f"{tuple(master.shape)} is attached; load an adapter of the same "
                        "rank and model."
                    )
                master.copy_(_like(master, value))

    def detach(self) -> None:
        """Give every module back as it was, with its own parameters and their requires_grad."""
        lengthen(self.routes)
        for spot in self.spots:
            if isinstance(spot.layer, LoCon):
                setattr(spot.owner, spot.attribute, spot.layer.base)
            else:
                with torch.no_grad():
                    parametrize.remove_parametrizations(
                        spot.owner, spot.attribute, leave_parametrized=False
                    )
        for parameter, wanted in self.frozen:
            parameter.requires_grad_(wanted)


def attach(
    parts: Mapping[str, nn.Module],
    adapter: Adapter,
    sites: Iterable[Site],
    *,
    initial: Adapter | None = None,
    dropouts: Dropouts = NONE,
    scales: Mapping[str, float] | None = None,
) -> Attached:
    """Insert an adapter at its sites; every other parameter of the parts is frozen.

    parts: "unet", "te1", "te2" to the modules that hold them. sites: at least those of the adapter.
    The student answers as the checkpoint rebuilt with the adapter would: a `pissa-init` adapter is
    its own start, a `pissa-trained` one needs its `initial`, a change starts from zero. Masters are
    fp32 on the device of the layer they belong to, whatever the dtype of the layer. scales: by
    entry, how often the product of a change's masters counts (alpha / dim); 1 otherwise.
    """
    if initial is not None or adapter.role != "pissa-init":
        check_pair(initial, adapter)
    by_name = {entry_name(site): site for site in sites}
    unknown = [name for name in adapter.entries if name not in by_name]
    if unknown:
        raise Refused(
            f"{len(unknown)} entries of the adapter belong to no site of this model, "
            f"first {', '.join(unknown[:5])}; use an adapter made for it."
        )
    switch = Switch()
    frozen = [(p, p.requires_grad) for part in parts.values() for p in part.parameters()]
    for parameter, _ in frozen:
        parameter.requires_grad_(False)
    began = adapter if initial is None else initial
    attached = Attached(began, [], switch, frozen, begun=adapter)
    try:
        for name, site in by_name.items():
            if name in adapter.entries:
                entry = adapter.entries[name]
                start = entry if attached.initial.role == "pissa-init" else None
                start = start if initial is None else initial.entries[name]
                scale = (scales or {}).get(name, 1.0)
                part = parts[site.part]
                spot = _insert(part, site, name, entry, start, switch, dropouts, scale)
                attached.spots.append(spot)
    except Refused:
        attached.detach()
        raise
    attached.routes = [module for part in parts.values() for module in shorten(part)]
    return attached


def quantiser(
    adapter: Adapter,
    sites: Iterable[Site],
    base: str,
    *,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
) -> Quantiser:
    """What `open_model` needs to quantise round an adapter that will be attached, by its start.

    base: "8bit" or "4bit". Layers with a full entry stay as they are; of those with principal
    factors only the residual is quantised. Text encoders are where a site is in them.
    """
    starts, whole, parts = {}, set(), {"unet"}
    for site in sites:
        entry = adapter.entries.get(entry_name(site))
        if entry is None:
            continue
        parts.add(site.part)
        if isinstance(entry, Full):
            whole.add((site.part, site.module))
        elif adapter.role == "pissa-init":
            starts[site.part, site.module] = entry
    where = torch.device(device)
    return Quantiser(base, dtype, where, starts, frozenset(whole), frozenset(parts))


def _insert(
    part: nn.Module,
    site: Site,
    name: str,
    entry: LowRank | Full,
    start: LowRank | Full | None,
    switch: Switch,
    dropouts: Dropouts,
    scale: float,
) -> Spot:
    module = part.get_submodule(site.module)
    base = module.base if isinstance(module, LoCon) and module.switch is switch else module
    if isinstance(base, LoCon):
        raise Refused(f"{site.module} already carries an adapter; detach that first.")
    weight = getattr(base, site.param)
    if entry.shape != tuple(weight.shape):
        raise Refused(
            f"{name} has shape {entry.shape}, the model's {site.module}.{site.param} has "
            f"{tuple(weight.shape)}; use an adapter made for this model."
        )
    if isinstance(entry, Full):
        if isinstance(base, Quantised):
            raise Refused(
                f"{site.module} is kept in {base.base}, but {name} trains it whole; open the "
                "model with a quantiser made for this adapter."
            )
        delta = Delta(entry.delta.to(weight.device, torch.float32), switch)
        parametrize.register_parametrization(base, site.param, delta)
        return Spot(name, base, site.param, delta, entry.shape)
    if not isinstance(base, nn.Linear | nn.Conv2d | Quantised) or getattr(base, "groups", 1) != 1:
        raise Refused(
            f"{name} is low-rank, but {site.module} is a {type(base).__name__}; only "
            "linear and ungrouped convolution layers take factors."
        )
    assert not isinstance(start, Full)
    began = None if start is None else _start(start, base, weight)
    layer = LoCon(base, _on(entry, weight), began, switch, dropouts, scale)
    above, _, leaf = site.module.rpartition(".")
    owner = part.get_submodule(above)
    setattr(owner, leaf, layer)
    return Spot(name, owner, leaf, layer, entry.shape)


def _start(start: LowRank, base: nn.Module, weight: Tensor) -> LowRank:
    """The first factors where the weight lies: those that a quantised base has there already."""
    there = base.start if isinstance(base, Quantised) else None
    moved = _on(start, weight)
    if there and torch.equal(there.up, moved.up) and torch.equal(there.down, moved.down):
        return there
    return moved


def _on(factors: LowRank, weight: Tensor) -> LowRank:
    """Factors in fp32 where a weight lies."""
    up = factors.up.to(weight.device, torch.float32)
    return LowRank(up, factors.down.to(weight.device, torch.float32))


def _value(layer: LoCon | Delta, shape: tuple[int, ...]) -> LowRank | Full:
    def copy(parameter: nn.Parameter) -> Tensor:
        found = parameter.detach()
        found = found.full_tensor() if hasattr(found, "full_tensor") else found
        return found.to("cpu", torch.float32, copy=True)

    if isinstance(layer, LoCon):
        up = copy(layer.up)
        return LowRank(up if layer.scale == 1 else up * layer.scale, copy(layer.down))
    return Full(copy(layer.delta).reshape(shape))


def _like(master: Tensor, value: Tensor) -> Tensor:
    """A value as a master holds it: shared out among processes where that is."""
    if not hasattr(master, "full_tensor"):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(master, DTensor)
    moved = value.to(master.device, master.dtype)
    return distribute_tensor(moved, master.device_mesh, master.placements)


def _same_names(attached: Adapter, other: Adapter) -> None:
    odd = sorted(attached.entries.keys() ^ other.entries.keys())
    if odd:
        raise Refused(
            f"{len(odd)} entries are in only one of the two adapters, first "
            f"{', '.join(odd[:5])}; load an adapter made from the same split."
        )
