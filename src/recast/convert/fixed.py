"""What is fixed before training: the validation set, and the originals of previews.

    watch/fixed.safetensors      latents, noise, times, answers (evaluate/validation.py)
    watch/previews.safetensors   the original's pictures of a few prompts, and their conditions

Both are made once, by the original with all its parts at hand, and read from then on. Latents are
images that are held out from training, or pictures that the original makes for prompts of the
report, from seeds that nothing else uses.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recast.checkpoint import Checkpoint, write_dict
from recast.convert import prompted
from recast.convert.bridge import Bridge, crossed
from recast.convert.folder import Folder
from recast.evaluate.bound import latents, noises, pictures
from recast.evaluate.validation import fix, pack, unpack, write_fixed
from recast.objective import Net, Objective, express
from recast.recipe import Recipe

if TYPE_CHECKING:
    from recast.convert import Job
    from recast.data.dataset import Dataset, Made
    from recast.model import Model
    from recast.text.encode import Condition

FIXED, PREVIEWS = "watch/fixed.safetensors", "watch/previews.safetensors"
ENOUGH = 16  # images for each one that is held out
MOST = 256  # images that are held out
CAPTIONS = "recast.captions"  # of the header of FIXED
APART = 1 << 20  # seeds of validation latents begin here, behind those of the report

Known = tuple[Tensor, "Condition", Sequence[str]]
"""Latents (V, C, h, w) of images held out from training, their conditions and captions."""


@dataclass(frozen=True)
class Originals:
    """What previews are held against: the original's pictures (P, 3, H, W), from the same seeds."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    seen: tuple[bool, ...]
    images: Tensor
    condition: Condition
    negative: Condition


def validates(recipe: Recipe) -> bool:
    """Whether a run of this recipe is long enough to be validated, and shall be."""
    how = recipe.watch
    return 0 < how.validate_every <= recipe.train.limit or how.validate_epochs > 0


def paints(recipe: Recipe) -> bool:
    """Whether a run of this recipe paints previews."""
    how = recipe.watch
    often = 0 < how.previews_every <= recipe.train.limit or how.previews_epochs > 0
    return often or how.previews_first


def previews(recipe: Recipe) -> bool:
    """Whether these are held against the original's pictures, for want of a prompts file."""
    return paints(recipe) and not recipe.watch.prompts


def parts(recipe: Recipe) -> tuple[str, ...]:
    """What of the model training needs."""
    decodes = paints(recipe) or (validates(recipe) and recipe.watch.alarm)
    return ("unet", "vae") if decodes else ("unet",)


def hold_out(made: Sequence[Made], recipe: Recipe) -> tuple[list[Made], list[Made]]:
    """(for training, held out): pictures of the commonest size, where there are enough images.

    As many as the recipe's share of all says, where it says one; else as it validates on.
    """
    from recast.data.batches import permutation

    usable = [entry for entry in made if not entry.problem]
    share = recipe.watch.validate_share
    count = min(MOST, round(share * len(usable))) if share else recipe.watch.validate_on
    enough = 0 < count < len(usable) if share else len(usable) >= ENOUGH * count
    if not (validates(recipe) and enough):
        return list(made), []
    (shape, _), *_ = Counter(entry.fit.target for entry in usable).most_common(1)
    same = [k for k, entry in enumerate(made) if not entry.problem and entry.fit.target == shape]
    order = permutation(len(same), recipe.train.seed, "held out")
    out = {same[place] for place in order[:count].tolist()}
    chosen = [made[k] for k in sorted(out)]
    return [entry for k, entry in enumerate(made) if k not in out], chosen


def known(dataset: Dataset, held: Sequence[Made]) -> Known | None:
    """Latents and conditions of held-out images, their captions in their own order."""
    from recast.data.captions import canonical

    if not held:
        return None
    store = dataset.store
    x0 = [store.latent(entry.example, entry.fit, entry.image)[0] for entry in held]
    captions = [canonical(e.example.caption, e.example.how) for e in held]
    condition = store.condition(captions, [e.fit for e in held])
    return torch.stack(x0).float(), condition, captions


def prepare(
    model: Model,
    student: Model,
    folder: Folder,
    job: Job,
    objective: Objective,
    bridge: Bridge | None,
    images: Known | None = None,
) -> None:
    """Write what the recipe wants watched, unless this run has it already.

    The student is the original itself, or has another VAE, which the bridge leads to.
    """

    def original(bound: Condition) -> Net:
        net = model.net(bound)
        carried = net if bridge is None else bridge.carried(net, model.objective)
        return express(carried, model.objective, objective)

    if validates(job.recipe) and not folder.has(FIXED):
        x0, condition, captions = images or self_made(model, folder, job)
        if images is None and student is not model:
            x0 = crossed(model, student, x0)
        fixed = fix(
            original, model.objective, objective, x0.to(model.device), condition, student.decode,
            job.recipe.train.seed,
        )  # fmt: skip
        said = {CAPTIONS: json.dumps(captions)}
        write_fixed(folder.path(FIXED), fixed, {**folder.stamp(), **said})
    if paints(job.recipe):
        prompted.prepare(model, folder, job.recipe)
    if previews(job.recipe) and not folder.has(PREVIEWS):
        write_originals(folder.path(PREVIEWS), originals(model, folder, job), folder.stamp())


def self_made(model: Model, folder: Folder, job: Job) -> Known:
    """Pictures that the original makes for the report's first prompts."""
    how = job.recipe
    prompts, _, _ = asked(model, folder, job, how.watch.validate_on)
    with torch.no_grad():
        condition = model.condition(prompts, size=how.data.size or None)
    seeds = [how.evaluate.seed + APART + k for k in range(len(prompts))]
    eps = noises(model.latent_shape(how.data.size or None), seeds).to(model.device)
    x0 = latents(
        model.net, model.objective, eps, condition, steps=how.evaluate.steps, batch=batch_of(eps)
    )
    return x0, condition, prompts


def captions_of(path: Path) -> tuple[str, ...]:
    """What the latents of a validation set show, for text encoders that are trained."""
    with Checkpoint(path) as file:
        return tuple(json.loads(file.metadata[CAPTIONS]))


def originals(model: Model, folder: Folder, job: Job) -> Originals:
    """The original's pictures of a few of the report's prompts, by its own sampler."""
    how = job.recipe
    prompts, seeds, seen = asked(model, folder, job, how.watch.previews)
    with torch.no_grad():
        condition = model.condition(prompts)
        negative = model.condition([""] * len(prompts))
    eps = noises(model.latent_shape(), seeds).to(model.device)
    x = latents(
        model.net, model.objective, eps, condition, negative, steps=how.watch.preview_steps,
        scale=how.evaluate.guidance, solver=how.evaluate.solver, batch=batch_of(eps),
    )  # fmt: skip
    images = torch.stack(pictures(model.decode, x))
    return Originals(prompts, seeds, seen, images, condition.to("cpu"), negative.to("cpu"))


def asked(
    model: Model, folder: Folder, job: Job, count: int
) -> tuple[tuple[str, ...], tuple[int, ...], tuple[bool, ...]]:
    """The report's first prompts and seeds over again until there are `count`; whether taught."""
    from recast.convert.material import training_captions
    from recast.convert.measure import choose

    test = choose(job, model.checkpoint, training_captions(job, model.checkpoint, folder))
    places = [k % len(test.prompts) for k in range(count)]
    return (
        tuple(test.prompts[k] for k in places),
        tuple(job.recipe.evaluate.seed + k for k in range(count)),
        tuple(test.seen[k] for k in places),
    )


def batch_of(eps: Tensor) -> int:
    """Pictures sampled at once: 32 of 64 pixels, one of 1024."""
    return max(1, 2048 // eps[0, 0].numel())


def write_originals(path: Path, made: Originals, stamp: dict[str, str]) -> None:
    about = {"prompts": made.prompts, "seeds": made.seeds, "seen": made.seen}
    tensors = {"images": made.images.half()}
    tensors |= pack(made.condition) | pack(made.negative, "negative")
    text = json.dumps(about, ensure_ascii=False)
    write_dict(path, tensors, {**stamp, "recast.previews": text}, force=True)


def read_originals(path: Path) -> Originals:
    """Read what `write_originals` wrote."""
    with Checkpoint(path) as file:
        held = {name: file[name] for name in file}
        about = json.loads(file.metadata["recast.previews"])
    prompts, seeds, seen = (tuple(about[name]) for name in ("prompts", "seeds", "seen"))
    images = held["images"].float()
    return Originals(prompts, seeds, seen, images, unpack(held), unpack(held, "negative"))
