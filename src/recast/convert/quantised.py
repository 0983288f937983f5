"""The base that a run trains on, kept in 8 or 4 bits: what is quantised, and what that changes.

The quantised weights exist in memory alone: files are made from the original's (see `rebuild`).
"""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from recast.checkpoint import Checkpoint
from recast.commit import commit
from recast.convert.folder import Folder
from recast.convert.texts import current
from recast.errors import Refused
from recast.events import Event, Note
from recast.layout import detect, from_file, keymap
from recast.objective import Objective
from recast.quantise import Quantiser, check_base, relative, tally, unquantised

if TYPE_CHECKING:
    from torch import Tensor

    from recast.convert import Job
    from recast.model import Model
    from recast.train.draws import Draw

FILE = "base.json"


def quantiser_of(checkpoint: Checkpoint, folder: Folder, job: Job) -> Quantiser | None:
    """What opens the network that the run's start will be attached to; None for the full base."""
    from recast.adapter.attach import quantiser
    from recast.adapter.decompose import zeros_full
    from recast.adapter.patch import read_patch
    from recast.convert.networks import kind_of, lora, sites_of
    from recast.convert.proceed import start_of
    from recast.convert.start import principal
    from recast.convert.training import precision

    how = job.recipe.train
    if how.base == "full":
        return None
    layout = detect(checkpoint)
    chosen = sites_of(layout, job.recipe)
    kind = kind_of(job.recipe)
    if job.recipe.network.weights:
        started = start_of(checkpoint, layout, folder, job)
        adapter, chosen = started.initial or started.adapter, started.sites
    elif kind == "principal":
        adapter = principal(checkpoint, folder, chosen, how.rank)
    elif kind == "lora":
        adapter = lora(checkpoint, chosen, job.recipe)
    else:
        there = read_patch(job.start).entries if job.start else {}
        adapter = zeros_full(checkpoint, chosen)
        adapter = replace(adapter, entries={**there, **adapter.entries})
        chosen = layout.sites("every") if job.start else chosen
    return quantiser(
        adapter, chosen, how.base,
        dtype=precision(job.recipe, job.device), device=job.device,
    )  # fmt: skip


def report_base(
    folder: Folder, model: Model, job: Job, draw: Draw, objective: Objective
) -> Generator[Event, None, None]:
    """Measure the quantised network against the original once, keep it in `base.json`, say it."""
    base = job.recipe.train.base
    if base == "full":
        return
    path = folder.path(FILE)
    if not path.exists():
        facts = {
            "base": base,
            "library": check_base(base, job.device),
            **asdict(tally(model.unet, model.dtype)),
            "forward_error": forward_error(model, draw, objective),
        }
        text = json.dumps(facts, indent=2).encode()
        commit(path, lambda file: file.write(text), size=len(text))
    yield Note(in_words(read_facts(folder)))


def forward_error(model: Model, draw: Draw, objective: Objective) -> float:
    """Relative error of one forward pass of the quantised UNet against the original's weights.

    The original's are read from the file as they are needed, one layer at a time.
    """
    import torch

    entries = {entry.param: entry for entry in keymap(model.layout) if entry.part == "unet"}

    def read(name: str) -> Tensor:
        [(_, tensor)] = from_file((entries[f"{name}.weight"],), model.checkpoint, "unet")
        return tensor.to(model.device, model.dtype)

    net = model.net(current(model, draw.condition), objective)
    with torch.no_grad():
        found = net(draw.x, draw.t)
        with unquantised(model.unet, read):
            return relative(found, net(draw.x, draw.t))


def read_facts(folder: Folder) -> Mapping[str, Any]:
    """What `base.json` says, nothing where the base was full."""
    path = folder.path(FILE)
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise Refused(f"{path} is not valid JSON ({error}): remove it.") from error


def in_words(facts: Mapping[str, Any]) -> str:
    """The facts as one sentence for the terminal and the report."""
    share = 100 * facts["quantised"] / facts["numbers"]
    return (
        f"Trained on a base in {facts['base']} ({facts['library']}): {share:.1f} % of the UNet's "
        f"weights, {facts['before'] / 1e6:,.1f} MB before, {facts['after'] / 1e6:,.1f} MB after; "
        f"one forward pass on the first batch is off by {100 * facts['forward_error']:.2g} % of "
        "its norm."
    )
