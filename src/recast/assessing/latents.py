"""Where an assessor's latents come from: the user's pictures, or what the teacher dreams.

They are split 80 : 10 : 10 by picture, so that no picture that was learned from is measured. Noise
is never taken for a picture: there, no answer depends on how noisy the input is.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from recast.assessing.settings import Settings
from recast.dream import Plan
from recast.errors import Refused, Stopped
from recast.events import Event, Stage, Tick
from recast.wishes import prompts_for

if TYPE_CHECKING:
    from recast.data.dataset import Made
    from recast.data.folder import Folder
    from recast.distillation.material import Material
    from recast.model import Model

PARTS = {"train": 0.8, "validate": 0.1, "test": 0.1}
LEAST = 10  # pictures, so that every part has one


@dataclass(frozen=True)
class Source:
    """A folder of images, or (None) what to dream of: the prompts of a file, or those that ship."""

    images: Path | None = None
    prompts: Path | None = None


def gather(
    model: Model, source: Source, settings: Settings, out: Path, stopped: Callable[[], int]
) -> Generator[Event, None, Mapping[str, Material] | None]:
    """The material of each part, made or found made; None where the user stopped it."""
    if source.images is not None:
        return (yield from _images(model, source.images, settings, out, stopped))
    return (yield from _dreams(model, source.prompts, settings, out, stopped))


def identity(model: Model, source: Source, settings: Settings) -> str:
    """What names the pictures: those dreamt by their plan, the user's by their content."""
    if source.images is None:
        return plan_of(model, source.prompts, settings).digest(model.checkpoint.sha256())
    from recast.assessing.settings import digest
    from recast.data.cache import hash_file

    found = found_images(source.images)
    return digest({e.name: f"{e.caption}\0{hash_file(e.path)}" for e in found.examples})


def found_images(folder: Path) -> Folder:
    """The user's pictures by name; raises Refused for too few, naming broken ones."""
    from recast.data.gather import gather as gather_images

    found = gather_images(folder)
    if len(found.examples) < LEAST:
        raise Refused(
            f"{folder} has {len(found.examples)} pictures: an assessor needs {LEAST} at least, "
            "to learn from some and be measured on others."
        )
    return found


def plan_of(model: Model, prompts: Path | None, settings: Settings) -> Plan:
    """What the teacher dreams of.

    Raises Refused where there is nothing to take latents of.
    """
    if settings.pictures < LEAST:
        raise Refused(
            f"{settings.pictures} dreamt pictures and no --images: an assessor is trained on "
            f"latents of {LEAST} pictures at least, never on noise."
        )
    known = prompts_for(prompts, model.checkpoint)
    return Plan(known, settings.pictures, seed=settings.seed, last=True)


def parts_of(count: int, seed: int) -> dict[str, list[int]]:
    """Which pictures belong to each part, every part at least one."""
    order = list(range(count))
    random.Random(f"{seed}/parts").shuffle(order)
    tenth = max(1, count // 10)
    return {
        "train": order[2 * tenth :],
        "validate": order[:tenth],
        "test": order[tenth : 2 * tenth],
    }


def _dreams(
    model: Model, prompts: Path | None, settings: Settings, out: Path, stopped: Callable[[], int]
) -> Generator[Event, None, Mapping[str, Material] | None]:
    from recast.distillation.dreams import dreamt

    plan = plan_of(model, prompts, settings)
    folder = out / "pairs" / plan.digest(model.checkpoint.sha256())
    try:
        found = yield from dreamt(model, folder, plan, settings.dropout, stopped)
    except Stopped:
        return None
    parts = parts_of(len(found.pictures), settings.seed)
    return {part: found.some(index) for part, index in parts.items()}


def _images(
    model: Model, folder: Path, settings: Settings, out: Path, stopped: Callable[[], int]
) -> Generator[Event, None, Mapping[str, Material] | None]:
    from recast.data.cache import Store
    from recast.data.dataset import Dataset, prepare, texts
    from recast.distillation.material import Images

    found = found_images(folder)
    store = Store(out / "cache", model)
    for text in ["", *texts(found)]:  # all encoders before the VAE: they may take turns
        store.text(text)
    made: list[Made] = []
    yield Stage("encode images", len(found.examples), "images")
    for entry in prepare(found, store):
        made.append(entry)
        yield Tick(len(made))
        if stopped():
            return None
    return {
        part: Images(Dataset.of(store, [made[k] for k in index]), settings.dropout)
        for part, index in parts_of(len(made), settings.seed).items()
    }
