"""Where training begins: zero changes, principal factors, a warm start, or another run's patch.

What is not zero is written once (`initial.safetensors`, `start.safetensors`) and read from there
ever after: a resumed run must start from the very bytes it started from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from recast.adapter import Adapter, entry_name, read_adapter, write_adapter
from recast.adapter.decompose import decompose, initial_metadata, zeros_full
from recast.adapter.patch import as_change, check_kind, distance_to_base, read_patch, refuse_far
from recast.adapter.places import read_site
from recast.checkpoint import Checkpoint
from recast.convert.folder import Folder
from recast.convert.networks import kind_of, lora, sites_of
from recast.errors import Refused
from recast.events import Event, Note
from recast.lowrank import Full, LowRank
from recast.objective import Objective

if TYPE_CHECKING:
    import torch

    from recast.convert import Job
    from recast.convert.bridge import Bridge
    from recast.convert.material import Material
    from recast.layout import Site
    from recast.model import Model

FILE = "start.safetensors"
WARM, PATCH = "recast.warm", "recast.start"


@dataclass(frozen=True)
class Start:
    """The adapter before training, the sites it sits at, and the entries that are not trained.

    initial: of principal factors that have been trained before.
    """

    adapter: Adapter
    sites: list[Site]
    held: frozenset[str] = frozenset()
    initial: Adapter | None = None


def check(checkpoint: Checkpoint, job: Job, source: str, objective: str) -> None:
    """Refuse a start that does not fit the model or the recipe; an override allows a far one."""
    how = job.recipe.train
    if kind_of(job.recipe) != "full" and (job.start or how.warm not in ("auto", "none")):
        what = f"--from {job.start}" if job.start else f"train.warm {how.warm!r}"
        raise Refused(f"{what} changes whole layers: set train.rank to 0, or leave it out.")
    if job.start is None:
        return
    if how.warm not in ("auto", "none"):
        raise Refused("a patch is a start already: set train.warm to auto, or leave the patch out.")
    patch = read_patch(job.start)
    if patch.metadata["recast.objective"] != objective:
        raise Refused(
            f"{job.start} makes {patch.metadata['recast.objective']} and {objective} is asked for: "
            "give a patch of that objective, or another --to."
        )
    check_kind(patch, checkpoint, source)


def check_distance(checkpoint: Checkpoint, job: Job) -> Generator[Event, None, None]:
    """Measure how far the model is from the patch's base; refuse a stranger unless told not to."""
    if job.start is not None:
        apart = distance_to_base(read_patch(job.start), checkpoint)
        if not job.far:
            refuse_far(apart, checkpoint)
        yield Note(_apart_in_words(asdict(apart)))


def identity(job: Job) -> dict[str, object]:
    """What names a run's start, nothing where it is the usual one."""
    if job.start is None:
        return {}
    digest = hashlib.sha256(job.start.read_bytes()).hexdigest()
    return {"start": digest, **({} if job.trains else {"trains": False})}


def begin(
    checkpoint: Checkpoint,
    folder: Folder,
    model: Model,
    job: Job,
    material: Material,
    objective: Objective,
) -> Generator[Event, None, Start]:
    """The start that the recipe or the command line asks for."""
    from recast.convert.proceed import proceed

    kind, sites = kind_of(job.recipe), sites_of(model.layout, job.recipe)
    if job.recipe.network.weights:
        return (yield from proceed(checkpoint, model.layout, folder, job))
    if kind == "principal":
        return Start(principal(checkpoint, folder, sites, job.recipe.train.rank), sites)
    if kind == "lora":
        return Start(lora(checkpoint, sites, job.recipe), sites)
    bridge = material.bridge
    if job.start is None and bridge is None and not warms(job, model.objective, objective):
        return Start(zeros_full(checkpoint, sites), sites)
    if not folder.has(FILE):
        zeros = zeros_full(checkpoint, sites)
        made = (
            warmed(checkpoint, model, job, bridge, objective, zeros)
            if job.start is None
            else patched(checkpoint, job, zeros)
        )
        write_adapter(folder.path(FILE), made, metadata=folder.stamp(), force=True)
    adapter = read_adapter(folder.path(FILE))
    for sentence in told(adapter.metadata) if job.start is None else ():
        yield Note(sentence)
    trained = {entry_name(site) for site in sites}
    everywhere = [
        site for site in model.layout.sites("every") if entry_name(site) in adapter.entries
    ]
    return Start(adapter, everywhere, frozenset(adapter.entries.keys() - trained))


def principal(checkpoint: Checkpoint, folder: Folder, sites: list[Site], rank: int) -> Adapter:
    """The principal factors, from `initial.safetensors` as soon as that is written."""
    path = folder.path("initial.safetensors")
    if not folder.has(path.name):
        found = decompose(checkpoint, sites, rank)
        write_adapter(path, found, metadata=folder.stamp(), force=True)
    return read_adapter(path)


def patched(checkpoint: Checkpoint, job: Job, zeros: Adapter) -> Adapter:
    """A patch's changes: in full where training goes on, as they are elsewhere."""
    assert job.start is not None
    patch = read_patch(job.start)
    entries: dict[str, LowRank | Full] = dict(zeros.entries)
    for name, entry in patch.entries.items():
        entries[name] = Full(entry.dense()) if name in zeros.entries else entry
    return _based(checkpoint, job, entries, patch)


def as_it_is(checkpoint: Checkpoint, job: Job) -> Adapter:
    """A patch's changes, nothing trained."""
    assert job.start is not None
    patch = read_patch(job.start)
    return _based(checkpoint, job, dict(patch.entries), patch)


def _based(
    checkpoint: Checkpoint, job: Job, entries: dict[str, LowRank | Full], patch: Adapter
) -> Adapter:
    """Changes with this checkpoint as their base, and what the patch was and how near."""
    apart = distance_to_base(patch, checkpoint)
    origin = {"base_sha256": patch.base or "", "sha256": identity(job)["start"], **asdict(apart)}
    about = {**initial_metadata(checkpoint, "full", None, None), PATCH: json.dumps(origin)}
    return as_change(entries, Adapter(entries, about))


def warms(job: Job, source: Objective, objective: Objective) -> bool:
    """Whether the time embedding is fitted first; needless where both objectives walk one path.

    "auto": where layers are trained whole and no patch is the start.
    """
    asked = job.recipe.train.warm
    wanted = asked == "clock" or (
        asked == "auto" and kind_of(job.recipe) == "full" and job.start is None
    )
    return wanted and source.path != objective.path


def warmed(
    checkpoint: Checkpoint,
    model: Model,
    job: Job,
    bridge: Bridge | None,
    objective: Objective,
    zeros: Adapter,
) -> Adapter:
    """Zero changes with what is fitted in closed form."""
    entries, residuals = dict(zeros.entries), {}
    if bridge is not None:
        entries |= over(checkpoint, model, bridge)
    if warms(job, model.objective, objective):
        found, residuals["clock"] = clock(checkpoint, model, objective)
        entries |= found
    about = {**zeros.metadata, WARM: json.dumps(residuals)}
    return as_change(entries, replace(zeros, metadata=about))


def over(checkpoint: Checkpoint, model: Model, bridge: Bridge) -> dict[str, LowRank | Full]:
    """Changes of the first and the last convolution for samples of another latent space."""
    from recast.convert.bridge import folded_in, folded_out

    first, last = (model.unet.get_submodule(name) for name in ("conv_in", "conv_out"))
    there = {"in": first.state_dict(), "out": last.state_dict()}
    new = {
        "conv_in.weight": folded_in(bridge, there["in"]["weight"]),
        "conv_out.weight": folded_out(bridge, there["out"]["weight"]),
        "conv_out.bias": folded_out(bridge, there["out"]["bias"]),
    }
    return _changes(checkpoint, model, new)


Fitted = tuple[dict[str, LowRank | Full], dict[str, float]]


def clock(checkpoint: Checkpoint, model: Model, objective: Objective) -> Fitted:
    """Changes of the time embedding that fit it to the new clock, and the errors."""
    from recast.train import fit_clock

    unet = model.unet
    # what is open may be rounded to bf16: the file's own numbers are what the change is added to
    sites = {site.name: site for site in model.layout.sites("unet")}
    embedding = deepcopy(unet.get_submodule("time_embedding")).float()
    for name, parameter in embedding.named_parameters():
        parameter.data.copy_(read_site(checkpoint, sites[f"time_embedding.{name}"]))
    features = unet.get_submodule("time_proj")
    fit = fit_clock(embedding, features, model.objective.path, objective.path)
    new = {f"time_embedding.{name}": value for name, value in fit.weights.items()}
    residuals = {"before": fit.before, "solved": fit.solved, "after": fit.after}
    return _changes(checkpoint, model, new), residuals


def _changes(
    checkpoint: Checkpoint, model: Model, new: Mapping[str, torch.Tensor]
) -> dict[str, LowRank | Full]:
    """New values of the UNet's parameters as changes of the file's."""
    sites = {site.name: site for site in model.layout.sites("unet")}
    return {
        entry_name(sites[name]): Full(value.cpu() - read_site(checkpoint, sites[name]).float())
        for name, value in new.items()
    }


def told(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """What an adapter's metadata says of its start, in sentences."""
    found = []
    if WARM in metadata:
        for kind, errors in json.loads(metadata[WARM]).items():
            found.append(
                f"Warm start of the {kind}: relative error {errors['before']:.3f} before, "
                f"{errors['after']:.4f} after."
            )
    if PATCH in metadata:
        origin = json.loads(metadata[PATCH])
        found.append(
            f"Begun with the patch of another model (sha256 {origin['base_sha256'][:12]}). "
            + _apart_in_words(origin)
        )
    return tuple(found)


def _apart_in_words(apart: Mapping[str, float]) -> str:
    return (
        f"Distance to the patch's base, in its norms: {apart['unet']:.4f} over the UNet, "
        f"{apart['patched']:.4f} over the tensors that the patch changes."
    )
