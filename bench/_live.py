"""What a training step holds in memory, counted tensor by tensor: alive at once, and kept."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Storage = torch.UntypedStorage


class Live(TorchDispatchMode):
    """Bytes of the tensors that operations made inside and that are still alive; their `peak`.

    What was there before is not counted, nor what an operation needs while it runs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = {id(s) for s in storages((args, kwargs))}
        found = func(*args, **(kwargs or {}))
        for storage in storages(found):
            if id(storage) not in given and id(storage) not in self._known:
                self._add(storage)
        return found

    def _add(self, storage: Storage) -> None:
        key, size = id(storage), storage.nbytes()
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class Kept:
    """Bytes that autograd keeps for the backward pass, without those of a network's own weights."""

    def __init__(self, net: torch.nn.Module) -> None:
        self._own = {id(s) for s in storages([*net.parameters(), *net.buffers()])}
        self._found: dict[int, int] = {}

    @property
    def bytes(self) -> int:
        """What was kept up to now."""
        return sum(self._found.values())

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, count what is saved."""

        def keep(tensor: Tensor) -> Tensor:
            for storage in storages(tensor):
                if id(storage) not in self._own:
                    self._found[id(storage)] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            yield


def storages(tree: Any) -> list[Storage]:
    """The memory of every tensor in a structure."""
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
