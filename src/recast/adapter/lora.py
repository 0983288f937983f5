"""A plain LoRA or LoCon: it starts from nothing; its file holds the factors as they are trained.

    change = alpha / dim * B A        A uniform within 1 / sqrt(fan in) of 0, B zero

A uniform is Kaiming's with a = sqrt(5), which kohya's networks, LyCORIS and PEFT draw too. The rank
of a convolution with a larger kernel is `conv_dim` whatever the layer's size, beyond its short side
as well: LyCORIS does the same, and its files could not be read by each other otherwise.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from recast.adapter.decompose import initial_metadata, matrices
from recast.adapter.file import DTYPES, Adapter, write_adapter
from recast.adapter.layers import NONE, Dropouts
from recast.adapter.places import entry_name, refuse_residual
from recast.checkpoint import Checkpoint
from recast.errors import CheckFailed
from recast.layout import Site
from recast.lowrank import Full, LowRank


@dataclass(frozen=True)
class Dims:
    """Rank and alpha of linear layers and 1x1 convolutions, and of other convolutions (0: none)."""

    dim: int
    alpha: float
    conv_dim: int
    conv_alpha: float

    def rank(self, site: Site) -> int:
        """The rank of a layer's factors; 0 leaves it out."""
        return self.conv_dim if spatial(site) else self.dim

    def scale(self, site: Site, rank: int | None = None) -> float:
        """How often the product of a layer's factors counts, at its own rank or another."""
        alpha = self.conv_alpha if spatial(site) else self.alpha
        return alpha / (rank or self.rank(site))


def spatial(site: Site) -> bool:
    """Whether a layer is a convolution that sees more than one place."""
    return math.prod(site.shape[2:]) > 1


def from_zero(
    checkpoint: Checkpoint,
    sites: Iterable[Site],
    dims: Dims,
    generator: Callable[[str], torch.Generator],
) -> Adapter:
    """A LoRA that changes nothing yet (role `delta`), fp32; generator: of an entry's numbers."""
    refuse_residual(checkpoint)
    entries: dict[str, LowRank | Full] = {}
    for site in matrices(sites):
        name, rank = entry_name(site), dims.rank(site)
        if rank:
            bound = math.prod(site.shape[1:]) ** -0.5
            drawn = torch.rand(rank, *site.shape[1:], generator=generator(name))
            entries[name] = LowRank(torch.zeros(site.shape[0], rank), (2 * drawn - 1) * bound)
    return Adapter(entries, initial_metadata(checkpoint, "delta", None, None))


def write_lora(
    path: Path,
    adapter: Adapter,
    dims: Dims,
    *,
    dtype: str = "F16",
    dropouts: Dropouts = NONE,
    metadata: Mapping[str, str] | None = None,
    force: bool = False,
) -> str:
    """Write a trained LoRA as kohya's trainer would, and return its sha256.

    One alpha, `dims.alpha`, for the whole file: layers with another one, or with another rank, have
    the rest in `up`. metadata: `ss_*` fields of the training and whatever else belongs in it.
    Raises CheckFailed where a factor leaves the range of the dtype.
    """
    for name, entry in adapter.entries.items():
        if isinstance(entry, LowRank):
            up = entry.up.abs().max() * (entry.rank / dims.alpha)
            _fits(name, max(up.item(), entry.down.abs().max().item()), dtype)
    return write_adapter(
        path, adapter, dtype=dtype, metadata=metadata, alpha=dims.alpha,
        trainer=network_fields(dims, dropouts), force=force,
    )  # fmt: skip


def _fits(name: str, largest: float, dtype: str) -> None:
    if not largest <= torch.finfo(DTYPES[dtype]).max:
        raise CheckFailed(
            f"{name} has factors of up to {largest:.3g}, which {dtype} has no room for: save it in "
            "bf16 or fp32 (network.save), or train with a smaller step."
        )


def network_fields(dims: Dims, dropouts: Dropouts) -> dict[str, str]:
    """The `ss_network_*` fields of kohya's trainer with LyCORIS."""
    args = {
        "algo": "locon",
        "preset": "full",
        "conv_dim": str(dims.conv_dim),
        "conv_alpha": str(dims.conv_alpha),
        "use_tucker": "False",
        "dropout": str(dropouts.values),
        "rank_dropout": str(dropouts.ranks),
        "module_dropout": str(dropouts.modules),
    }
    return {
        "ss_network_module": "lycoris.kohya",
        "ss_network_dim": str(dims.dim),
        "ss_network_alpha": str(dims.alpha),
        "ss_network_args": json.dumps(args),
    }
