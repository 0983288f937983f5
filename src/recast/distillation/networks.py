"""Teacher and student: the original, and a copy of it that is trained, whole or by an adapter.

    full      a copy of the UNet in fp32; AdamW's decay acts on its weights
    adapter   a LoRA from zero on the original, which is its own teacher: no second UNet

`dense` says what the student's UNet is in the names of a file, whichever it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from recast.distill.losses import AIMS
from recast.distill.step import Tapped
from recast.distill.taps import FeatureTap
from recast.distillation.config import Config
from recast.errors import Refused
from recast.objective import OBJECTIVES, Net, Objective

if TYPE_CHECKING:
    from recast.adapter import Adapter, Attached
    from recast.checkpoint import Checkpoint
    from recast.layout import Layout, Site
    from recast.model import Model

PRECISION = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Pair:
    """Both networks as the loop uses them; `parameters` are the student's that are trained.

    `model` is the original, whose text encoders and VAE serve both; `learner` has the student's
    UNet in its place. `dense` is the student's UNet as it is now, fp32 on the CPU. `tap`
    is the teacher's.
    """

    model: Model
    learner: Model
    teacher: Tapped
    student: Tapped
    parameters: dict[str, nn.Parameter]
    dense: Callable[[], Mapping[str, Tensor]]
    tap: FeatureTap

    @property
    def objective(self) -> Objective:
        return self.student.objective


def objective_of(config: Config) -> Objective:
    """What the student learns to predict."""
    return OBJECTIVES[AIMS[config.target.kind].objective]


def share_of(config: Config) -> float:
    """The teacher's share of the target: the config's where it is mixed."""
    share = AIMS[config.target.kind].share
    return config.target.share if 0 < share < 1 else share


def dtype_of(config: Config, device: str) -> torch.dtype:
    """The precision of the forward passes; masters and losses are fp32 whatever it is."""
    from recast.model import usual_dtype

    name = config.run.precision
    return usual_dtype(device) if name == "auto" else PRECISION[name]


def open_original(checkpoint: Checkpoint, config: Config, device: str) -> Model:
    """The original, its networks opened when they are asked for."""
    from recast.model import open_model

    return open_model(
        checkpoint, dtype=dtype_of(config, device), device=device,
        objective=config.run.source or None, lazily=True, together=True,
    )  # fmt: skip


@contextmanager
def pair(model: Model, config: Config, blocks: tuple[str, ...] | None) -> Iterator[Pair]:
    """Both networks, tapped at `blocks` (None: all); an adapter is taken out at the end."""
    if config.student.kind == "full":
        yield whole(model, config, blocks)
        return
    from recast.adapter import attach

    adapter, sites = lora(model, config)
    attached = attach({"unet": model.unet}, adapter, sites)
    try:
        yield adapted(model, config, blocks, attached)
    finally:
        attached.detach()


def whole(model: Model, config: Config, blocks: tuple[str, ...] | None) -> Pair:
    """A copy of the UNet, trained where the profile says."""
    from recast.model import load_part

    unet = copy.deepcopy(model.unet)
    if model.dtype != torch.float32:
        unet = load_part(model.checkpoint, model.layout, "unet", torch.float32, model.device)
    chosen = {
        site.name for site in model.layout.sites(config.student.profile) if site.part == "unet"
    }
    objective = objective_of(config)
    if config.student.warm == "clock":
        warm(unet, model.objective, objective)
    parameters = {name: p for name, p in unet.named_parameters() if name in chosen}
    if not parameters:
        raise Refused(f"student.profile {config.student.profile!r} names no layer of the UNet.")
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    learner = replace(model, parts={"unet": unet}, dtype=torch.float32)

    def dense() -> Mapping[str, Tensor]:
        state = unet.state_dict()
        return Lazy(tuple(state), lambda name: state[name].detach().float().cpu())

    teacher, tap = tapped(model, model.objective, config, blocks)
    student, _ = tapped(learner, objective, config, blocks)
    return Pair(model, learner, teacher, student, parameters, dense, tap)


def warm(unet: nn.Module, source: Objective, objective: Objective) -> None:
    """Fit the time embedding to the times of another path, in closed form."""
    from recast.train import fit_clock

    if source.path == objective.path:
        return
    embedding = unet.get_submodule("time_embedding")
    features = unet.get_submodule("time_proj")
    fit = fit_clock(embedding, features, source.path, objective.path)
    with torch.no_grad():
        for name, value in fit.weights.items():
            embedding.get_parameter(name).copy_(value)


def adapted(
    model: Model, config: Config, blocks: tuple[str, ...] | None, attached: Attached
) -> Pair:
    """The original with an adapter in it; the teacher answers with the adapter switched off."""
    plain, tap = tapped(model, model.objective, config, blocks)

    def bind(condition: Any) -> Net:
        net = plain.bind(condition)

        def answer(x: Tensor, t: Tensor) -> Tensor:
            with attached.teacher():
                return net(x, t)

        return answer

    student, _ = tapped(model, objective_of(config), config, blocks)
    return Pair(
        model, model, replace(plain, bind=bind), student, attached.named(),
        lambda: merged(model, attached), tap,
    )  # fmt: skip


def merged(model: Model, attached: Attached) -> Mapping[str, Tensor]:
    """The original's UNet with the adapter added, fp32 on the CPU."""
    from recast.adapter.places import entry_name

    base = unet_of(model.checkpoint, model.layout)
    trained = attached.trained().entries
    names = {site.name: entry_name(site) for site in model.layout.sites("unet")}

    def read(name: str) -> Tensor:
        entry = trained.get(names.get(name, ""))
        found = base[name]
        return found if entry is None else found + entry.dense().reshape(found.shape)

    return Lazy(tuple(base), read)


def unet_of(checkpoint: Checkpoint, layout: Layout) -> Mapping[str, Tensor]:
    """A file's UNet, fp32 on the CPU."""
    from recast.layout import from_file, keymap

    entries = {entry.param: entry for entry in keymap(layout) if entry.part == "unet"}

    def read(name: str) -> Tensor:
        (found,) = from_file((entries[name],), checkpoint, "unet")
        return found[1].float()

    return Lazy(tuple(entries), read)


class Lazy(Mapping[str, Tensor]):
    """Tensors by name, each made when it is asked for."""

    def __init__(self, names: tuple[str, ...], read: Callable[[str], Tensor]) -> None:
        self.names, self.read = dict.fromkeys(names), read

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def lora(model: Model, config: Config) -> tuple[Adapter, list[Site]]:
    """A LoRA that changes nothing yet, and its sites."""
    from recast.adapter.decompose import is_matrix
    from recast.adapter.lora import Dims, from_zero
    from recast.train import seeded

    named = model.layout.sites(config.student.profile)
    sites = [site for site in named if site.part == "unet" and is_matrix(site)]
    dim = config.student.dim
    dims = Dims(dim, float(dim), dim, float(dim))
    adapter = from_zero(
        model.checkpoint, sites, dims, lambda name: seeded(config.run.seed, "lora", name)
    )
    return adapter, sites


def tapped(
    model: Model, objective: Objective, config: Config, blocks: tuple[str, ...] | None
) -> tuple[Tapped, FeatureTap]:
    """A model as the loop uses it, and its tap."""
    tap = FeatureTap(model.unet, blocks, config.blocks.where)
    return Tapped(lambda condition: model.net(condition, objective), tap, objective), tap
