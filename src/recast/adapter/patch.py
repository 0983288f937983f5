"""A patch: what training changed, alone, in names that ComfyUI loads on the original."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from recast.adapter.file import Adapter
from recast.adapter.rebuild import change, changed, check_pair, rebuild
from recast.checkpoint import Checkpoint
from recast.errors import Refused
from recast.lowrank import Full, LowRank, truncate


def patch_from(initial: Adapter | None, trained: Adapter, *, rank: int | None = None) -> Adapter:
    """trained - initial as an adapter of its own, of role `delta`, or `full` without factors.

    Low-rank differences are re-factored: rank None keeps 2r, which is exact. initial None is meant
    for an adapter that is a change already.
    """
    check_pair(initial, trained)
    entries: dict[str, LowRank | Full] = {}
    for name, entry in trained.entries.items():
        delta = change(None if initial is None else initial.entries[name], entry)
        entries[name] = truncate(delta, rank) if isinstance(delta, LowRank) else delta
    patch = Adapter(entries, {})
    about = {k: v for k, v in trained.metadata.items() if k.startswith("recast.")}
    about["recast.role"] = "full" if patch.rank is None else "delta"
    if patch.rank is not None:
        about["recast.rank"] = str(patch.rank)
    return Adapter(entries, about)


def apply_patch(
    checkpoint: Checkpoint, patch: Adapter, *, other_base: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a checkpoint with a patch added.

    other_base allows a relative of the checkpoint that the patch was made from: another fine-tune
    of the family is converted roughly. Raises Refused for an adapter that is no change.
    """
    if patch.role not in ("delta", "full"):
        raise Refused(
            f"the adapter is {patch.role}, which is no change of weights; make a patch "
            "from it and its initial adapter first."
        )
    return changed(checkpoint, None, patch) if other_base else rebuild(checkpoint, None, patch)
