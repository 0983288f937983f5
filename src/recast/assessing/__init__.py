"""A run of `recast assessor train`: a teacher's checkpoint in, an assessor and its report out.

pictures -> latents -> noised latents -> features of the teacher     pairs/ or cache/, features/
                                      -> features of random weights
features -> fit -> temperatures -> report.json, report.md -> assessor.safetensors

Chunks of features stay, so the same command goes on where it was stopped; a fit begins anew.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recast.assessing.settings import SPLITS, Settings, Split, digest
from recast.commit import lock
from recast.errors import CheckFailed, Refused
from recast.events import Event, Note, Stage, Tick

if TYPE_CHECKING:
    from recast.assessing.features import Features
    from recast.assessing.latents import Source
    from recast.distill.assessor import Assessor
    from recast.model import Model

    Splits = Mapping[Split, Features]

CONTROL: tuple[Split, ...] = ("train", "validate", "test")


@dataclass(frozen=True)
class Job:
    """What the command line asks for; `objective` overrides what the checkpoint says of itself."""

    model: Path
    out: Path
    source: Source
    settings: Settings = field(default_factory=Settings)
    objective: str | None = None
    device: str = "cpu"
    force: bool = False


def run(job: Job, stopped: Callable[[], int] = lambda: 0) -> Iterator[Event]:
    """Make the assessor, or find it made; yields progress.

    Raises Refused for bad input with nothing written, CheckFailed for an assessor that is not
    usable: then only its report is.
    """
    from recast.assessing.latents import identity
    from recast.assessing.record import ASSESSOR, PAGE, finished, write

    model, how = opened(job), job.settings
    about = {"teacher": model.checkpoint.sha256(), "objective": model.objective.name,
             "pictures": identity(model, job.source, how)}  # fmt: skip
    tag = digest({**about, **asdict(how)})
    if finished(job.out, tag, force=job.force):
        yield Note(f"{job.out / ASSESSOR} is this assessor already.")
        return
    with lock(job.out):
        material = yield from collected(job, model, digest({**about, **how.of_features()}), stopped)
        if material is None:
            return
        seen, chance = material
        assessor = yield from fitted("fit", seen, how, stopped)
        control = None if assessor is None else (yield from fitted("control", chance, how, stopped))
        if assessor is None or control is None:
            return
        found = reported(assessor, seen, control, chance, how)
        write(job.out, assessor, fingerprint(model, how), {**about, "digest": tag}, how, found)
    if found["trouble"]:
        raise CheckFailed(f"{found['trouble']} ({job.out / PAGE} has the figures.)")


def collected(
    job: Job, model: Model, name: str, stopped: Callable[[], int]
) -> Generator[Event, None, tuple[Splits, Splits] | None]:
    """Features of the teacher and of the random network, on the device; None where stopped."""
    from recast.assessing.features import Place, collect
    from recast.assessing.latents import gather

    how = job.settings
    material = yield from gather(model, job.source, how, job.out, stopped)
    if material is None:
        return None
    place = Place(job.out / "features" / name, name)
    found: list[Splits] = []
    for one, where, splits in (
        (model, place, SPLITS),
        (randomised(model, how.seed), replace(place, control=True), CONTROL),
    ):
        each = yield from collect(one, material, how, where, splits, stopped)
        if each is None:
            return None
        found.append({split: part.to(model.device) for split, part in each.items()})
    return found[0], found[1]


def opened(job: Job) -> Model:
    """The teacher in fp32; refuses a checkpoint without what gives latents."""
    import torch

    from recast.model import open_model

    parts = None if job.source.images is None else ("unet", "te1", "te2", "vae")
    return open_model(
        job.model, dtype=torch.float32, device=job.device, objective=job.objective, lazily=True,
        parts=parts or ("unet", "te1", "te2"),
    )  # fmt: skip


def randomised(model: Model, seed: int) -> Model:
    """The model with a UNet as it is before any training."""
    import torch
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(**model.layout.unet)
    return replace(model, parts={"unet": unet.to(model.device).eval().requires_grad_(False)})


def fingerprint(model: Model, settings: Settings) -> dict[str, str]:
    """What a network has to share with the teacher for this assessor to read it."""
    from recast.distill.taps import FeatureTap

    tap = FeatureTap(model.unet, where=settings.where)
    return tap.fingerprint(model.objective, settings.pooling)


def fitted(
    name: str, seen: Mapping[Split, Features], how: Settings, stopped: Callable[[], int]
) -> Generator[Event, None, Assessor | None]:
    """An assessor fitted to the train split and calibrated on another; None where stopped."""
    from recast.assessing.features import batches
    from recast.distill.assessor import Assessor, Shape, widths
    from recast.distill.calibrate import calibrate
    from recast.distill.fit import fit
    from recast.train import seeded

    shape = Shape(
        widths(seen["train"].pooled), how.d, how.hidden, how.bins, how.patterns,
        how.prototypes, how.pattern_head,  # type: ignore[arg-type]
    )  # fmt: skip
    made = Assessor(shape, seeded(how.seed, "assessor")).to(seen["train"].t.device)
    made.standardise(seen["train"].pooled)
    yield Stage(name, how.steps, "steps")
    stream = batches(seen["train"], how.batch, how.seed)
    for step in fit(made, stream, steps=how.steps, lr=how.lr, weight_decay=how.weight_decay):
        yield Tick(step.step, step.loss)
        if stopped():
            return None
    calibrate(made, seen["validate"].pooled, seen["validate"].t)
    return made.eval().requires_grad_(False)


def reported(
    assessor: Assessor, seen: Mapping[Split, Features], control: Assessor,
    chance: Mapping[Split, Features], how: Settings,
) -> dict[str, Any]:  # fmt: skip
    """Every figure of the report; `trouble` is a sentence where the assessor is not usable."""
    from recast.distill import report
    from recast.distill.reliability import active_bins

    test, crossed = seen["test"], seen["mismatch"]
    figures = report.measure(assessor, test.pooled, test.t)
    correct, n = (report.over_blocks(figures, what) for what in ("right", "n"))
    before, after = report.shuffled(assessor, test.pooled, test.t)
    moved = report.shifted(assessor, test.pooled, test.t)
    trouble, active = "", None
    try:
        active = active_bins(correct, n, threshold=how.threshold).tolist()
    except Refused as error:
        trouble = f"{error}."
    if after <= before or moved > report.STILL:
        trouble = "the assessor does not react as it must to shuffled features or shifted logits."
    weights = report.untrained(assessor, test.pooled, test.t)
    random = report.measure(control, chance["test"].pooled, chance["test"].t)
    against = report.mismatch(assessor, crossed.pooled, crossed.fed, crossed.t)
    return {
        "trouble": trouble,
        "parameters": assessor.parameter_count(),
        "blocks": {name: asdict(each) for name, each in figures.items()},
        "random": {
            name: {"top1": each.top1, "within1": each.within1, "ce": each.ce, "n": each.n}
            for name, each in random.items()
        },
        "mismatch": {name: asdict(each) for name, each in against.items()},
        "mismatch_n": len(crossed.t),
        "shuffled": {"before": before, "after": after},
        "shifted": moved,
        "untrained": {
            "weights": weights,
            "saturated": sum(each >= 3 for each in weights.values()) / len(weights),
        },
        "profile": {
            "n": [int(each) for each in n.tolist()],
            "accuracy": (correct / n.clamp(min=1)).tolist(),
            "difficulty": report.over_blocks(figures, "ce").tolist(),
            "pattern": report.over_blocks(figures, "entropy").tolist(),
            "active": active,
        },
    }
