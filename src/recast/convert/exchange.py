"""The recipe's VAE: the checkpoint that has it, and the model that works in its latent space."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from recast.checkpoint import Checkpoint
from recast.convert import bridge as bridges
from recast.convert.bridge import Bridge
from recast.convert.folder import Folder
from recast.errors import Refused
from recast.layout import detect, latents
from recast.layout.vae import exchanged
from recast.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor

    from recast.convert import Job
    from recast.data.dataset import Dataset
    from recast.model import Model


def with_vae(checkpoint: Checkpoint, recipe: Recipe) -> Checkpoint:
    """The checkpoint with the recipe's VAE, or itself where the recipe names none."""
    data = recipe.data
    if not data.vae:
        return checkpoint
    given = data.vae_scale > 0
    return exchanged(
        checkpoint, Path(data.vae), data.vae_scale if given else None,
        data.vae_shift if given else None, fold=data.vae_fold,
    )  # fmt: skip


def check(checkpoint: Checkpoint, job: Job) -> Mapping[str, str]:
    """Refuse a VAE that does not fit, or a run that it cannot be part of; returns what names it."""
    recipe = job.recipe
    if not recipe.data.vae:
        return {}
    if job.via or job.start:
        other = "--via" if job.via else "a patch to begin with"
        raise Refused(
            f"another VAE and {other} cannot be in one run: convert into the VAE in a run of its "
            "own."
        )
    with with_vae(checkpoint, recipe) as found:
        layout = detect(found)
        return {
            "vae": found.metadata[latents.VAE_FILE],
            "vae_latents": f"{layout.scaling!r} {layout.shift!r}",
        }


def into(model: Model, checkpoint: Checkpoint, recipe: Recipe) -> Model:
    """The model with the recipe's VAE, its other networks shared; itself where there is none."""
    from recast.model import beside, load_part

    if not recipe.data.vae:
        return model
    import torch

    with ExitStack() as stack:
        found = with_vae(checkpoint, recipe)
        stack.callback(found.close)
        layout = detect(found)
        vae = partial(load_part, found, layout, "vae", torch.float32, model.device)
        parts = beside(model.parts, "vae", vae)
        stack.pop_all()
    return replace(
        model, checkpoint=found, layout=layout, parts=parts, scaling=layout.scaling,
        shift=layout.shift, _fingerprints={},
    )  # fmt: skip


def bridge_of(old: Tensor, new: Tensor, folder: Folder, recipe: Recipe) -> Bridge:
    """The bridge between latents of the same pictures, made once; refused where it cannot carry."""
    bridge = bridges.read(folder)
    if bridge is None:
        bridge = bridges.fit(old[: bridges.FITTED], new[: bridges.FITTED])
        check_bridge(bridge, recipe)
        bridges.keep(folder, bridge)
    return bridge


def bridge_of_images(
    old: Model, new: Model, dataset: Dataset, folder: Folder, recipe: Recipe
) -> Bridge | None:
    """The bridge over a folder's first images; None where the VAE stays."""
    if new is old:
        return None
    import torch

    first = dataset.entries[: bridges.FITTED]
    shape = first[0].fit.target
    pixels = (dataset.store.pixels(e.example, e.fit) for e in first if e.fit.target == shape)
    with torch.no_grad():
        pairs = [(old.encode(one).cpu(), new.encode(one).cpu()) for one in pixels]
    one, other = (torch.cat(side) for side in zip(*pairs, strict=True))
    return bridge_of(one, other, folder, recipe)


def check_bridge(bridge: Bridge, recipe: Recipe) -> None:
    """Refuse the original as teacher where its latent space is too far from the new one."""
    if recipe.target.teacher != "data" and not bridge.residual <= bridges.FAR:
        raise Refused(
            f"{bridge.in_words().rstrip('.')}, so the original cannot teach in the new one: set "
            'target.teacher = "data".'
        )
