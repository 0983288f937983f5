"""Going on from an adapter of any format, by what its numbers mean in this run's network.

    lora        the file's factors, at their own ranks, and alpha of the recipe: the same change
    full        what the file changes, in full
    principal   T0 + change, as one product:  [B0 | B] [A0 ; A]  from the start  [B0 | 0] [A0 ; A];
                or the factors of another run, with the initial.safetensors that lies beside them

Entries that the profile does not name act as they are and are not trained.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from recast.adapter import Adapter, entry_name, read_adapter, write_adapter
from recast.adapter.decompose import decompose, initial_metadata, zeros_full
from recast.adapter.file import trained_metadata
from recast.adapter.patch import as_change
from recast.adapter.places import places
from recast.adapter.rebuild import check_pair
from recast.checkpoint import Checkpoint
from recast.convert.folder import Folder
from recast.convert.networks import dims_of, kind_of, lora, sites_of
from recast.convert.start import Start
from recast.errors import Refused
from recast.events import Event, Note
from recast.layout import Layout, Site
from recast.layout.peft import adapter_files
from recast.lowrank import Full, LowRank

if TYPE_CHECKING:
    from recast.convert import Job

INITIAL, START = "initial.safetensors", "start.safetensors"
BASES = ("recast.base_sha256", "ss_new_sd_model_hash")  # where a file names its checkpoint


def weights_of(job: Job) -> Path | None:
    """The adapter that a run goes on from."""
    named = job.recipe.network.weights
    return Path(named) if named else None


def check(checkpoint: Checkpoint, layout: Layout, job: Job, objective: str) -> None:
    """Refuse an adapter of another base or that this network cannot go on from."""
    path = weights_of(job)
    if path is None:
        return
    if job.start is not None or job.recipe.train.warm not in ("auto", "none"):
        raise Refused(f"{path} is a start already: leave the patch, or train.warm, out.")
    found = read_adapter(path, layout)
    for key in BASES:
        named = found.metadata.get(key)
        if named is not None and named != checkpoint.sha256() and not job.far:
            raise Refused(
                f"{path} belongs to the checkpoint with sha256 {named[:12]} ({key}), and "
                f"{checkpoint.path} is {checkpoint.sha256()[:12]}: give the checkpoint it was "
                "made for, or --far."
            )
    learnt = found.metadata.get("recast.objective", objective)
    if learnt != objective and not job.far:
        raise Refused(
            f"a network with {path} predicts {learnt}, and {objective} is trained here: give an "
            "adapter of that objective, or --far."
        )
    places(checkpoint, found.entries)
    if kind_of(job.recipe) == "principal":
        partner(path, found)
    else:
        check_pair(None, found)


def identity(job: Job) -> dict[str, object]:
    """What names the adapter that a run goes on from, by its bytes."""
    path = weights_of(job)
    if path is None:
        return {}
    found = hashlib.sha256()
    for file, _ in adapter_files(path):
        found.update(file.read_bytes())
    return {"weights": found.hexdigest()}


def proceed(
    checkpoint: Checkpoint, layout: Layout, folder: Folder, job: Job
) -> Generator[Event, None, Start]:
    """The start of a run that goes on, and a word on what of it is trained."""
    start = start_of(checkpoint, layout, folder, job)
    yield Note(f"Goes on from {weights_of(job)}: {in_words(start, layout, job)}.")
    return start


def start_of(checkpoint: Checkpoint, layout: Layout, folder: Folder, job: Job) -> Start:
    """The start of a run that goes on, made once and then read from the run's own files."""
    path = weights_of(job)
    assert path is not None
    sites, kind = sites_of(layout, job.recipe), kind_of(job.recipe)
    if not folder.has(START):
        found = read_adapter(path, layout)
        if kind == "principal":
            first, made = principal(checkpoint, sites, job.recipe.train.rank, path, found)
            write_adapter(folder.path(INITIAL), first, metadata=folder.stamp(), force=True)
        else:
            made = change(checkpoint, sites, job, found)
        write_adapter(folder.path(START), made, metadata=folder.stamp(), force=True)
    adapter = read_adapter(folder.path(START))
    initial = read_adapter(folder.path(INITIAL)) if kind == "principal" else None
    trained = {entry_name(site) for site in sites}
    everywhere = [site for site in layout.sites("every") if entry_name(site) in adapter.entries]
    return Start(adapter, everywhere, frozenset(adapter.entries.keys() - trained), initial)


def change(checkpoint: Checkpoint, sites: list[Site], job: Job, found: Adapter) -> Adapter:
    """A change as the start of a LoRA or of whole layers; layers that it lacks start from zero."""
    whole = kind_of(job.recipe) == "full"
    zeros = zeros_full(checkpoint, sites) if whole else lora(checkpoint, sites, job.recipe)
    entries: dict[str, LowRank | Full] = dict(zeros.entries)
    for name, entry in found.entries.items():
        entries[name] = Full(entry.dense()) if whole and name in zeros.entries else entry
    return as_change(entries, zeros)


def principal(
    checkpoint: Checkpoint, sites: list[Site], rank: int, path: Path, found: Adapter
) -> tuple[Adapter, Adapter]:
    """(initial, start) of principal factors with a change on top, or of another run's factors."""
    before = partner(path, found)
    there = found.entries.keys() if before is not None else set()
    fresh = [site for site in sites if entry_name(site) not in there]
    base = decompose(checkpoint, fresh, rank) if fresh else None
    first: dict[str, LowRank | Full] = dict(base.entries) if base else {}
    start: dict[str, LowRank | Full] = dict(first)
    for name, entry in found.entries.items():
        if before is not None:
            first[name], start[name] = before.entries[name], entry
        elif name in first:
            first[name], start[name] = joined(name, first[name], entry)
        else:
            first[name], start[name] = nothing(entry), entry
    about = base.metadata if base else initial_metadata(checkpoint, "pissa-init", None, None)
    about = {k: v for k, v in about.items() if k not in ("recast.energy", "recast.rank")}
    return Adapter(first, about), Adapter(start, trained_metadata(about))


def partner(path: Path, found: Adapter) -> Adapter | None:
    """The initial adapter of another run's principal factors; None for a change."""
    if not found.role.startswith("pissa"):
        return None
    beside = path.parent / INITIAL
    if not beside.is_file():
        raise Refused(
            f"{path} is {found.role} and means nothing without its start: put that run's "
            f"{INITIAL} beside it."
        )
    initial = read_adapter(beside)
    check_pair(initial, found)
    return initial


def joined(name: str, first: LowRank | Full, change: LowRank | Full) -> tuple[LowRank, LowRank]:
    """(start, value) of rank r + r' whose product moves by a change."""
    if isinstance(first, Full) or isinstance(change, Full):
        raise Refused(
            f"{name} is changed as a whole, and principal factors cannot go on from that: set "
            "network.kind to full, or take recast extract to factor it first."
        )
    down = torch.cat([first.down, change.down])
    blank = torch.zeros_like(change.up)
    start = LowRank(torch.cat([first.up, blank], 1), down)
    return start, LowRank(torch.cat([first.up, change.up], 1), down)


def nothing(entry: LowRank | Full) -> LowRank | Full:
    """The start of a change that stays as it is."""
    if isinstance(entry, Full):
        return Full(torch.zeros_like(entry.delta))
    return LowRank(torch.zeros_like(entry.up), entry.down)


def in_words(start: Start, layout: Layout, job: Job) -> str:
    """What of a start is trained, and where its ranks are not the recipe's."""
    own, dims = 0, dims_of(job.recipe)
    for site in sites_of(layout, job.recipe) if kind_of(job.recipe) == "lora" else ():
        entry = start.adapter.entries[entry_name(site)]
        own += isinstance(entry, LowRank) and entry.rank != dims.rank(site)
    told = f"{len(start.adapter.entries) - len(start.held)} layers are trained"
    if own:
        told += f", {own} of them at the file's own rank"
    return told + (f"; {len(start.held)} others act as they are" if start.held else "")
