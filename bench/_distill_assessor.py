"""The assessor of bench/distill: fitted to the teacher's features, calibrated, profiled, once.

Pictures of the training split in the shares 80/10/10: to fit, to calibrate, to profile. Times are
uniform, a tenth of the samples silent, noisy latents as the path makes them. 20 bins.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from _distill_arms import BINS
from _distill_world import RUNS, SILENT, World, bound, turn, world
from torch import Tensor

from recast.objective import EPS
from recast.train.draws import seeded

if TYPE_CHECKING:
    from torch import nn

    from recast.distill.assessor import Assessor
    from recast.distill.sampler import TimeSampler

FITTED, CALIBRATED, PROFILED = 6000, 2000, 10000
STEPS, BATCH = 1000, 128
SIZES = {"d": 64, "hidden": 128, "bins": BINS, "patterns": 10, "prototypes": "shared"}
SHIFT, TOWARD = 3.0, "noise"
Pooled = dict[str, Tensor]


def assessor_of(unet: nn.Module, teacher: str) -> tuple[Assessor, Tensor, TimeSampler]:
    """The assessor, its active bins, and the sampler of its profile; made if there is none."""
    from recast.distill.sampler import Profile, sampler
    from recast.distill.store import read_assessor, write_assessor
    from recast.distill.taps import FeatureTap

    file = RUNS / "assessor" / f"{teacher[:12]}.safetensors"
    fingerprint = FeatureTap(unet).fingerprint(EPS)
    with turn(RUNS / "assessor"):
        if not file.exists():
            assessor, facts = made(unet)
            write_assessor(file, assessor, fingerprint, facts)
    assessor, facts = read_assessor(file, fingerprint)
    it = {key: torch.tensor(facts[key]) for key in ("difficulty", "pattern", "active")}
    profile = Profile(it["difficulty"].double(), it["pattern"].double(), it["active"])
    times = sampler(profile, toward=TOWARD, shift=SHIFT, chaos=True)
    return assessor, it["active"], times


def made(unet: nn.Module) -> tuple[Assessor, dict[str, Any]]:
    """Fit, calibrate, profile: the assessor and its figures."""
    from recast.distill.assessor import Assessor, Shape, widths
    from recast.distill.calibrate import calibrate
    from recast.distill.fit import fit

    data = world("train")
    tenth = len(data.x0) // 10
    pooled, t = features(unet, part(data, 0, 8 * tenth), FITTED, "fit")
    shape = Shape(widths(pooled), **SIZES)  # type: ignore[arg-type]
    assessor = Assessor(shape, torch.Generator().manual_seed(0))
    assessor.standardise(pooled)
    for step in fit(assessor.train(), batches(pooled, t), steps=STEPS):
        if step.step % 100 == 0:
            print(f"assessor {step.step}: {step.loss:.3f}", flush=True)
    assessor.eval().requires_grad_(False)
    calibrate(assessor, *features(unet, part(data, 8 * tenth, 9 * tenth), CALIBRATED, "calibrate"))
    return assessor, profiled(
        assessor, *features(unet, part(data, 9 * tenth, 10 * tenth), PROFILED, "profile")
    )


def part(data: World, first: int, last: int) -> World:
    """Some of the pictures."""
    return World(data.x0[first:last], data.shown[first:last], data.scenes[first:last])


@torch.no_grad()
def features(unet: nn.Module, data: World, count: int, name: str) -> tuple[Pooled, Tensor]:
    """The teacher's pooled features of that many noisy samples, and their times."""
    from recast.distill.taps import FeatureTap, pool

    source, found, times = seeded("assessor", name), [], []
    with FeatureTap(unet) as tap:
        for _ in range(0, count, 200):
            rows = torch.randint(len(data.x0), (200,), generator=source)
            t = torch.rand(200, generator=source).clamp(1e-3, 1 - 1e-6)
            heard = torch.rand(200, 1, generator=source) >= SILENT
            eps = torch.randn(data.x0[rows].shape, generator=source)
            bound(unet, EPS.path, data.shown[rows] * heard)(EPS.noise(data.x0[rows], eps, t), t)
            found.append(pool(tap.taken()))
            times.append(t)
    return {name: torch.cat([each[name] for each in found]) for name in found[0]}, torch.cat(times)


def batches(pooled: Pooled, t: Tensor) -> Iterator[tuple[Pooled, Tensor]]:
    """Random batches without end."""
    source = seeded("assessor", "batches")
    while True:
        rows = torch.randint(len(t), (BATCH,), generator=source)
        yield {name: each[rows] for name, each in pooled.items()}, t[rows]


@torch.no_grad()
def profiled(assessor: Assessor, pooled: Pooled, t: Tensor) -> dict[str, Any]:
    """Accuracy by block, and by bin: accuracy, cross-entropy, pattern entropy, active or not."""
    from recast.distill.assessor import bin_of
    from recast.distill.reliability import active_bins
    from recast.distill.signals import absolute

    k = bin_of(t, BINS)
    hits = {
        name: (reading.time_logits.argmax(1) == k).double()
        for name, reading in assessor(pooled).items()
    }
    e_t, e_p, _ = absolute(assessor, pooled, t)
    mean = torch.stack(list(hits.values())).mean(0)
    n = torch.bincount(k, minlength=BINS)
    correct = torch.bincount(k, mean, minlength=BINS)

    def by_bin(values: Tensor) -> list[float]:
        return (torch.bincount(k, values.double().mean(1), minlength=BINS) / n).tolist()

    return {
        "accuracy": {name: round(float(each.mean()), 4) for name, each in hits.items()},
        "accuracy_bins": [round(v, 4) for v in (correct / n).tolist()],
        "difficulty": by_bin(e_t), "pattern": by_bin(e_p),
        "active": active_bins(correct, n).tolist(), "n": len(t),
    }  # fmt: skip


def facts_of(teacher: str) -> dict[str, Any]:
    """The stored figures, for the page."""
    from recast.distill.store import read_assessor

    _, facts = read_assessor(RUNS / "assessor" / f"{teacher[:12]}.safetensors")
    return facts
