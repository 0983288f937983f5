"""The assessor at work in a run: what it finds hard, which of its bins count, how blocks weigh.

Difficulty is profiled once, on the teacher alone, evenly over the teacher's own times; a bin of the
student's times takes it from the teacher's time of the same noise level.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from recast.checkpoint import Checkpoint, write_dict
from recast.distill.assessor import Assessor, bin_of
from recast.distill.fusion import Fused, Fusion, base_weights
from recast.distill.reliability import active_bins
from recast.distill.sampler import Profile
from recast.distill.signals import AssessorOutput, absolute, assess
from recast.distill.step import Tapped
from recast.distill.store import read_assessor
from recast.distill.taps import FeatureTap, pool
from recast.distillation.config import Blocks, Config
from recast.distillation.material import Material
from recast.errors import Refused
from recast.events import Event, Stage, Tick
from recast.objective import Objective, retime
from recast.timesteps import stratified
from recast.train import seeded

FINGERPRINT = "recast.fingerprint"
APART = 1  # added to the run's seed: the profile's pictures come in another order than training's


@dataclass
class Guide:
    """What weighs the blocks: the fusion, and the assessor it listens to, if there is one.

    `pooling` is the assessor's; `active` (K,) its bins that are believed, None before the profile.
    """

    fusion: Fusion
    settings: Blocks
    assessor: Assessor | None = None
    pooling: str = "mean"
    active: Tensor | None = None

    def assess(
        self, mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor], t: Tensor
    ) -> AssessorOutput:
        """Signals of the student's features beside the teacher's."""
        assert self.assessor is not None
        student, teacher = (
            pool({name: each.detach() for name, each in features.items()}, self.pooling)
            for features in (mine, theirs)
        )
        return assess(
            self.assessor, student, t, teacher_pooled=teacher, form=self.settings.signals,
            active_bins=self.active,
        )  # fmt: skip

    def weigh(self, step: int, signals: AssessorOutput | None, kd: Tensor) -> Fused:
        """The blocks' weights: by the assessor, or their own where there is none."""
        if signals is None:
            return Fused.plain(self.fusion.base.float().to(kd.device))
        return self.fusion.weigh(signals)


def blocks_of(path: str) -> tuple[str, ...] | None:
    """The blocks that an assessor reads; None without one. Raises Refused for another file."""
    if not path:
        return None
    with Checkpoint(path) as file:
        try:
            return tuple(json.loads(file.metadata[FINGERPRINT])["blocks"].split(","))
        except (KeyError, ValueError, AttributeError) as error:
            raise Refused(f"{path} is no assessor: make one with recast assessor train.") from error


def open_guide(config: Config, tap: FeatureTap, source: Objective, device: str) -> Guide:
    """The guide of a run; refuses an assessor that was made for another network or tap."""
    how = config.blocks
    fusion = Fusion(
        base_weights(tap.blocks), low=how.low, high=how.high, ema=how.ema,
        normalise=how.normalise, every=how.every,
    )  # fmt: skip
    fusion.self_test()
    if not how.assessor:
        return Guide(fusion, how)
    with Checkpoint(how.assessor) as file:
        pooling = json.loads(file.metadata[FINGERPRINT]).get("pooling", "mean")
    assessor, _ = read_assessor(Path(how.assessor), tap.fingerprint(source, pooling))
    return Guide(fusion, how, assessor.to(device), pooling)


@dataclass(frozen=True)
class Found:
    """What N samples of the teacher came to in the assessor's K bins, float64 (K,) each."""

    difficulty: Tensor
    pattern: Tensor
    correct: Tensor
    n: Tensor

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.__dict__)


def profiled(
    guide: Guide, teacher: Tapped, material: Material, config: Config, out: Path, digest: str,
    device: str,
) -> Generator[Event, None, Found]:  # fmt: skip
    """Profile the teacher, or find it done; returns what was found."""
    path = out / "profile.safetensors"
    if path.exists():
        with Checkpoint(path) as file:
            if file.metadata.get("recast.run") == digest:
                return Found(**{name: file[name] for name in file})
    assert guide.assessor is not None
    bins = guide.assessor.shape.bins
    sums = torch.zeros(4, bins, dtype=torch.float64)
    done, total = 0, config.times.profile
    yield Stage("profile", total, "samples")
    for pooled, t in teacher_features(teacher, material, config, device, guide.pooling):
        k = bin_of(t, bins)
        e_t, e_p, _ = absolute(guide.assessor, pooled, t)
        readings = guide.assessor(pooled)
        right = torch.stack([r.time_logits.argmax(1) == k for r in readings.values()], 1)
        for row, each in zip(sums, (e_t, e_p, right, torch.ones_like(e_t)), strict=True):
            row.index_add_(0, k.cpu(), each.double().mean(1).cpu())
        done += len(t)
        yield Tick(min(done, total))
        if done >= total:
            break
    n = sums[3].clamp(min=1)
    found = Found(sums[0] / n, sums[1] / n, sums[2], sums[3])
    write_dict(path, found.tensors(), {"recast.run": digest}, force=True)
    return found


@torch.no_grad()
def teacher_features(
    teacher: Tapped, material: Material, config: Config, device: str, pooling: str
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """(pooled features, times) of noised pictures on the teacher's path, evenly over its times."""
    seed, size, objective = config.run.seed, config.run.batch, teacher.objective
    number = 0
    while True:
        x0, condition = material.batch(number, size, seed + APART)
        t = stratified(size, seeded(seed, "profile times", number)).to(device)
        eps = torch.randn(x0.shape, generator=seeded(seed, "profile noise", number)).to(device)
        with teacher.tap:
            bound = teacher.bind(condition.to(torch.device(device)))
            bound(objective.noise(x0.to(device), eps, t), t)
            yield pool(teacher.tap.taken(), pooling), t
        number += 1


def believed(found: Found, config: Config) -> Tensor:
    """The assessor's bins that count; raises Refused where they are too few."""
    how = config.times
    return active_bins(found.correct, found.n, threshold=how.threshold, worst=how.worst)


def carried(
    found: Found, active: Tensor, config: Config, objective: Objective, source: Objective
) -> Profile:
    """The profile in bins of the student's times."""
    bins = config.times.bins
    centres = (torch.arange(bins, dtype=torch.float64) + 0.5) / bins
    there = retime(centres, objective.path, source.path).clamp(max=1)
    k = bin_of(there, len(found.difficulty))
    return Profile(found.difficulty[k], found.pattern[k], active[k])


def self_test(
    guide: Guide, teacher: Tapped, material: Material, config: Config, device: str
) -> None:
    """Raise Refused unless the blocks' weights react to features that are not the teacher's."""
    assert guide.assessor is not None
    pooled, t = next(teacher_features(teacher, material, config, device, guide.pooling))
    # features of other times and pictures: half a batch away
    strange = {name: each.roll(max(1, len(each) // 2), 0) for name, each in pooled.items()}
    still, moved = (
        guide.fusion.clipped(
            assess(guide.assessor, each, t, teacher_pooled=pooled, form=guide.settings.signals)
        )
        for each in (pooled, strange)
    )
    if torch.equal(still, moved):
        raise Refused(
            f"{guide.settings.assessor}: the blocks' weights do not react to shuffled features, so "
            "it says nothing; train the assessor anew, or take relative signals"
        )
