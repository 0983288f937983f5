"""Weights shared out among processes by rows, with their gradients, moments and averages.

    W (O, …) = rows of process 0 | rows of process 1 | …         (O cut as torch.chunk cuts it)

torch's `fully_shard` gathers a block's weights while it computes, and hands every process the sum
of its rows' gradients. The optimizer is given these rows as plain tensors, so it must treat every
number by itself. What is written is whole: a state belongs to any number of processes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from recast import processes
from recast.checkpoint import dtype_name

UNITS = ("down_blocks", "up_blocks", "resnets", "attentions", "transformer_blocks")
ALONE = "mid_block"
STATE = re.compile(r"o\.state\.(\d+)\.")  # an optimizer's tensor, by its parameter's number


def spread(network: nn.Module, device: torch.device) -> None:
    """Share out a network's weights for good, block by block; every process has all of them."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (processes.count(),))
    for unit in [*units(network), network]:
        # after each pass: what a look at averages has gathered must not stay
        shared = fully_shard(unit, mesh=mesh, reshard_after_forward=True)
        shared.set_gradient_divide_factor(1.0)  # losses are means over all processes already
        shared.set_force_sum_reduction_for_comms(True)


def units(network: nn.Module) -> list[nn.Module]:
    """What is gathered at once, inner blocks first."""
    found = []
    for name, module in network.named_modules():
        above, _, last = name.rpartition(".")
        above = above.rpartition(".")[2]
        if last == ALONE or (above in UNITS and last.isdigit()):
            found.append(module)
    return found[::-1]


@dataclass(frozen=True)
class Shards:
    """Parameters by name, in the optimizer's order, and of those that are shared out the rows.

    Text encoders are not shared out; their parameters are their own rows.
    """

    whole: Mapping[str, nn.Parameter]
    rows: Mapping[str, nn.Parameter]

    @classmethod
    def of(cls, parameters: Mapping[str, nn.Parameter]) -> Shards:
        """The rows share memory with what the network computes with."""

        def row(p: nn.Parameter) -> nn.Parameter:
            return nn.Parameter(p.to_local().detach()) if isinstance(p, DTensor) else p

        return cls(dict(parameters), {name: row(p) for name, p in parameters.items()})

    @cached_property
    def owners(self) -> dict[int, DTensor]:
        """The parameter that rows belong to, by their id."""
        return {id(self.rows[k]): p for k, p in self.whole.items() if isinstance(p, DTensor)}

    def grouped(self, groups: Iterable[Any]) -> list[Any]:
        """What to build an optimizer of, rows in the place of parameters."""
        rows = {id(p): self.rows[name] for name, p in self.whole.items()}
        return [
            {**group, "params": [rows[id(p)] for p in group["params"]]}
            if isinstance(group, dict)
            else rows[id(group)]
            for group in groups
        ]

    def give(self, row: Tensor) -> None:
        """Move a parameter's gradient to its rows."""
        parameter = self.owners[id(row)]
        if parameter.grad is not None:
            row.grad = cast(DTensor, parameter.grad).to_local()
            parameter.grad = None

    def owner(self, name: str) -> DTensor | None:
        """The parameter that a tensor of a state is about, by the tensor's name in its file."""
        if match := STATE.match(name):
            name = list(self.whole)[int(match[1])]
        found = self.whole.get(name)
        return found if isinstance(found, DTensor) else None

    def specs(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The dtype and the whole shape of tensors, of which some are rows."""
        found = {}
        for name, tensor in tensors.items():
            owner = self._owner_of(name, tensor)
            shape = tensor.shape if owner is None else owner.shape
            found[name] = (dtype_name(tensor.dtype), tuple(shape))
        return found

    def gathered(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Tensors one by one, whole and on the CPU; every process must ask for all of them."""
        for name, tensor in tensors.items():
            owner = self._owner_of(name, tensor)
            if owner is None:
                yield name, tensor
                continue
            rows = DTensor.from_local(
                tensor.detach(), owner.device_mesh, owner.placements,
                shape=owner.shape, stride=owner.stride(),
            )  # fmt: skip
            yield name, rows.full_tensor().cpu()

    def cut(self, name: str, tensor: Tensor) -> Tensor:
        """This process's rows of what a state's file holds under a name."""
        owner = self.owner(name)
        if owner is None or tensor.shape != owner.shape:
            return tensor
        pieces = tensor.chunk(processes.count())
        mine = processes.rank()
        return pieces[mine] if mine < len(pieces) else tensor[:0]

    def of_file(self, saved: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A state's file as this process's rows of it."""
        return Cut(self, saved)

    def _owner_of(self, name: str, tensor: Tensor) -> DTensor | None:
        owner = self.owner(name)
        return None if owner is None or tensor.shape != owner.to_local().shape else owner


@dataclass(frozen=True)
class Cut(Mapping[str, Tensor]):
    """A state's file, of which every tensor is read as this process's rows of it."""

    shards: Shards
    saved: Mapping[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.shards.cut(name, self.saved[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.saved)

    def __len__(self) -> int:
        return len(self.saved)
