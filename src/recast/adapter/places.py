"""Where the entries of an adapter lie in a checkpoint file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from recast.checkpoint import Checkpoint
from recast.errors import Refused
from recast.layout import Site, detect
from recast.lowrank import Full, LowRank


@dataclass(frozen=True)
class Place:
    """An entry's name and the site it changes."""

    name: str
    site: Site

    def view(self, tensor: Tensor) -> Tensor:
        """The part of a file's tensor that belongs to the site, as the module sees it; no copy."""
        part = tensor if self.site.rows is None else tensor[slice(*self.site.rows)]
        return part.T if self.site.transpose else part


def entry_name(site: Site) -> str:
    """The key of a site's entry in an adapter."""
    return f"{site.lora}.{site.param}"


def places(
    checkpoint: Checkpoint, entries: Mapping[str, LowRank | Full | Site]
) -> dict[str, list[Place]]:
    """Places of the entries by the file's tensor; a stacked tensor has several, in row order.

    Raises Refused for names or shapes that the checkpoint does not have.
    """
    known = {entry_name(site): site for site in detect(checkpoint).sites("every")}
    odd = [name for name in entries if name not in known]
    if odd:
        raise Refused(
            f"{len(odd)} of {len(entries)} adapter entries have no place in {checkpoint.path}, "
            f"first {', '.join(odd[:5])}: the adapter is for another architecture."
        )
    wrong = [name for name, entry in entries.items() if tuple(entry.shape) != known[name].shape]
    if wrong:
        raise Refused(
            f"{len(wrong)} adapter entries have other shapes than {checkpoint.path}, first "
            f"{', '.join(wrong[:5])}: the adapter is for a model of another size."
        )
    found: dict[str, list[Place]] = {}
    for name, site in known.items():
        if name in entries:
            found.setdefault(site.key, []).append(Place(name, site))
    return found


def read_site(checkpoint: Checkpoint, site: Site) -> Tensor:
    """The parameter of a site, as the module sees it."""
    return Place("", site).view(checkpoint[site.key])


def refuse_residual(checkpoint: Checkpoint) -> None:
    """Refuse a residual in the place of an original."""
    if checkpoint.metadata.get("recast.role") == "residual":
        raise Refused(
            f"{checkpoint.path} is the residual of a split, not a model: give the checkpoint it "
            f"was split from (sha256 {checkpoint.metadata.get('recast.base_sha256', '?')[:12]})."
        )
