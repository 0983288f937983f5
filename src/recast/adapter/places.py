"""Where the entries of an adapter lie in a checkpoint file; what a residual may be used for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from recast.checkpoint import Checkpoint
from recast.errors import Refused
from recast.layout import Site, detect
from recast.layout.names import PART_NAMES, SPLIT, named, part_of, split_parts
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


def split_field(sites: Iterable[Site]) -> dict[str, str]:
    """What a residual's header says about the layers that were split, as `unet=788,te1=72`."""
    counts = Counter(site.part for site in sites)
    return {SPLIT: ",".join(f"{part}={counts[part]}" for part in PART_NAMES if counts[part])}


def widened(tensor: Tensor) -> Tensor:
    """In fp32, in which sums are formed; fp64 stays. Those two are not copied."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def refuse_residual(checkpoint: Checkpoint) -> None:
    """Refuse a residual in the place of an original."""
    if checkpoint.metadata.get("recast.role") == "residual":
        parts = split_parts(checkpoint.metadata)
        raise Refused(
            f"{checkpoint.path} is the residual of a split, not a model: the principal weights of "
            f"its {named(parts) or 'split parts'} are in the adapter; give the checkpoint it was "
            "split from "
            f"(sha256 {checkpoint.metadata.get('recast.base_sha256', '?')[:12]})."
        )


def refuse_partial(residual: Checkpoint, entries: Mapping[str, LowRank | Full]) -> None:
    """Refuse an adapter that leaves layers of a residual without their principal weights.

    The usual case is a LoRA of the UNet alone beside a residual whose text encoders were split
    too: it runs, with captions that mean nothing.
    """
    held = Counter(part_of(name) for name in entries if isinstance(entries[name], LowRank))
    wanted = split_parts(residual.metadata)
    short = [part for part, count in wanted.items() if held[part] < count]
    if short:
        counts = ", ".join(f"{held[p]} of {wanted[p]} of the {PART_NAMES[p]}" for p in short)
        raise Refused(
            f"{residual.path} lacks the principal weights of its {named(wanted)}, and the adapter "
            f"brings only {counts}: the {named(short)} would answer with what is left of it; give "
            "the whole adapter of that split, or split only what is trained."
        )
