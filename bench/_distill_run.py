"""One arm of bench/distill with one seed: the student's run, and what is seen of it.

Everything random is a function of (seed, step): pictures, noise, uniform times and the silent
scenes are the same for all arms of a seed. A teacher that has answered a seed's uniform draws once
is not asked again by the next arm: what it said is kept, with its features pooled.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from _distill_arms import Arm, LossAware, Uncertainty, constant, fused, placebo
from _distill_measure import Held, held, measure, signals_by_bin, spread_of
from _distill_world import RUNS, SILENT, World, bound, teacher, world
from torch import Tensor

from recast.objective import EPS, Net, V
from recast.timesteps import EDGE
from recast.train.draws import Draw, seeded

if TYPE_CHECKING:
    from torch import nn

    from recast.distill.assessor import Assessor
    from recast.distill.loop import DistilStep
    from recast.distill.sampler import TimeSampler

Row = dict[str, Any]
STEPS, BATCH, RATE, DECAY, CLIP = 100, 16, 1e-3, 1e-3, 1.0
EVERY = 10  # steps between two points of a curve
GRADIENTS = 33  # steps between two looks at the gradients of both terms
HALF, MORE, BOOST = STEPS // 2, 20, 3.0  # of the arm gain


@dataclass(frozen=True)
class Sight:
    """What the net is shown: scenes (B, 28), and the step whose answers may be kept, if any."""

    shown: Tensor
    step: int | None


@dataclass
class Kept:
    """A tapped teacher that answers each kept step once; features are pooled to (B, C, 1, 1)."""

    unet: nn.Module
    answers: dict[int, tuple[Tensor, dict[str, Tensor]]] = field(default_factory=dict)
    features: dict[str, Tensor] | None = None

    def __post_init__(self) -> None:
        from recast.distill.taps import FeatureTap

        self.tap = FeatureTap(self.unet)

    def __enter__(self) -> Kept:
        self.tap.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.tap.__exit__(*exception)

    def taken(self) -> dict[str, Tensor]:
        """The features of the last answer."""
        assert self.features is not None
        found, self.features = self.features, None
        return found

    def bind(self, sight: Sight) -> Net:
        """The teacher as a net."""

        def net(x: Tensor, t: Tensor) -> Tensor:
            if sight.step is not None and sight.step in self.answers:
                answer, self.features = self.answers[sight.step]
                return answer
            answer = bound(self.unet, EPS.path, sight.shown)(x, t)
            self.features = {n: f.mean((2, 3), True) for n, f in self.tap.taken().items()}
            if sight.step is not None:
                self.answers[sight.step] = answer, self.features
            return answer

        return net


@dataclass
class Bench:
    """What all rows share: data, teacher, assessor, held-out set; answers of the seed at hand."""

    data: World
    unet: nn.Module
    hash: str
    assessor: Assessor
    active: Tensor
    times: TimeSampler
    held: Held
    seed: int = -1
    kept: Kept = field(init=False)

    def of(self, seed: int) -> Kept:
        """The teacher with what it has answered for a seed."""
        if seed != self.seed:
            self.seed, self.kept = seed, Kept(self.unet)
        return self.kept


def bench() -> Bench:
    """Make or read what all rows share."""
    from _distill_assessor import assessor_of

    unet, found = teacher()
    assessor, active, times = assessor_of(unet, found)
    return Bench(world("train"), unet, found, assessor, active, times, held(unet))


@dataclass
class Drawn:
    """An arm's draws; `aware` hears of every step's losses."""

    shared: Bench
    arm: Arm
    seed: int
    aware: LossAware | None = None

    def __call__(self, first: int, last: int) -> Iterator[Draw]:
        for step in range(first, last):
            yield self.draw(step)

    def draw(self, step: int) -> Draw:
        """The batch of a step, a pure function of (seed, step) but for A7's times."""
        source, data = seeded(self.seed, "draw", step), self.shared.data
        rows = torch.randint(len(data.x0), (BATCH,), generator=source)
        eps = torch.randn(BATCH, *data.x0.shape[1:], generator=source)
        even = torch.rand(BATCH, generator=source).clamp(EDGE, 1 - EDGE)
        heard = torch.rand(BATCH, 1, generator=source) >= SILENT
        t, weight, step_kept = even, None, step
        if self.aware:
            t, weight = self.aware.draw(even)
        elif self.arm.kind in ("A6", "A8"):
            t, weight = self.shared.times.draw(BATCH, seeded(self.seed, "times", step))
        x0 = data.x0[rows]
        x = V.noise(x0, eps, t)
        if self.arm.kind == "N1":
            x = torch.randn(x.shape, generator=seeded(self.seed, "negative", step))
        common = weight is None and self.arm.kind != "N1"
        sight = Sight(data.shown[rows] * heard, step_kept if common else None)
        return Draw(x0, eps, t, x, sight, rows, weight=weight)


def weigher_of(arm: Arm, seed: int, blocks: tuple[str, ...], frozen: list[float] | None) -> Any:
    """How the arm's blocks weigh; `frozen` is the mean of A2's weights, for A4."""
    from recast.distill.fusion import base_weights

    base = torch.tensor(list(base_weights(blocks).values()))
    if arm.kind == "A4":
        assert frozen is not None
        return constant(torch.tensor(frozen))
    if arm.kind == "A5":
        return Uncertainty(base)
    if arm.kind == "A3":
        return placebo(blocks, seed)
    if arm.kind in ("A2", "A8", "N1"):
        return fused(blocks)
    return fused(blocks, "none") if arm.kind == "A2-literal" else constant(base)


def assess_of(shared: Bench, arm: Arm) -> Any:
    """What asks the assessor, for arms whose weights rest on it."""
    from recast.distill.signals import assess
    from recast.distill.taps import pool

    if arm.kind not in ("A2", "A3", "A8", "N1", "A2-literal"):
        return None
    form = "literal" if arm.kind == "A2-literal" else "relative"

    def asked(mine: Any, theirs: Any, t: Tensor) -> Any:
        return assess(
            shared.assessor, pool(mine), t, teacher_pooled=pool(theirs), form=form,
            active_bins=None if form == "literal" else shared.active,
        )  # fmt: skip

    return asked


@dataclass
class Student:
    """A student with its optimizer and what ties it to the loop."""

    unet: nn.Module
    optimizer: torch.optim.Optimizer

    @classmethod
    def of(cls, original: nn.Module) -> Student:
        """The teacher's weights, to be trained."""
        unet = copy.deepcopy(original).requires_grad_(True).train()
        return cls(unet, torch.optim.AdamW(unet.parameters(), RATE, weight_decay=DECAY, fused=True))

    def bind(self, sight: Sight) -> Net:
        return bound(self.unet, V.path, sight.shown)


def steps(
    shared: Bench, arm: Arm, seed: int, student: Student, weigher: Any, first: int, last: int
) -> Iterator[DistilStep]:
    """Train from one step to another."""
    from recast.distill.loop import Tapped, distil
    from recast.distill.taps import FeatureTap

    kept = shared.of(seed)
    aware = LossAware() if arm.kind == "A7" else None
    for step in distil(
        Tapped(student.bind, FeatureTap(student.unet), V),
        Tapped(kept.bind, kept, EPS),
        Drawn(shared, arm, seed, aware)(first, last),
        optimizer=student.optimizer, weigher=weigher, block_weight=arm.weight,
        assess=assess_of(shared, arm), clip=CLIP, done=first, gradients_every=GRADIENTS,
        schedule=lambda k: 0.5 * (1 + math.cos(math.pi * min(k, STEPS) / STEPS)),
    ):  # fmt: skip
        if aware:
            aware.see(step.losses, step.times)
        yield step


def run_row(shared: Bench, arm: Arm, seed: int, frozen: list[float] | None = None) -> Row:
    """Train an arm's student and measure it."""
    began = time.process_time()
    if arm.kind == "gain":
        found = gain(shared, arm, seed)
    else:
        student = Student.of(shared.unet)
        blocks = shared.assessor.blocks
        weigher = weigher_of(arm, seed, blocks, frozen)
        curve = [[0, shared.held.error(student.unet, V, few=True)]]
        taken = []
        for step in steps(shared, arm, seed, student, weigher, 0, STEPS):
            taken.append(step)
            if step.step % EVERY == 0:
                curve.append([step.step, shared.held.error(student.unet, V, few=True)])
        keep = RUNS / "samples" / f"{arm.name}.safetensors" if seed == 0 else None
        figures = measure(shared.held, student.unet, seed, keep=keep)
        found = {"curve": curve, **logged(taken), **figures}
        if arm.kind == "A2":
            found |= signals_by_bin(shared.held, student.unet, shared.assessor)
    return found | {"cpu_seconds": round(time.process_time() - began, 1)}


def logged(taken: list[DistilStep]) -> Row:
    """The run by its steps: losses, weights over time, ratios of the two terms."""
    flow = [step.flow for step in taken]
    pieces = [taken[k : k + EVERY] for k in range(0, len(taken), EVERY)]
    found: Row = {"flow": [_mean([step.flow for step in piece]) for piece in pieces]}
    found["diverged"] = not all(math.isfinite(each) for each in flow)
    if not len(taken[0].values):
        return found
    values = torch.stack([step.values for step in taken])
    ratios = [step.gradient_ratio for step in taken if step.gradient_ratio is not None]
    return found | {
        "kd": [spread_of([step.kd.sum().item() for step in piece]) for piece in pieces],
        "weights": [
            [piece[-1].step, *_rounded(torch.stack([s.values for s in piece]).mean(0))]
            for piece in pieces
        ],
        "weights_mean": _rounded(values.mean(0), 6),
        "weights_std": _rounded(values.std(0)),
        "saturated": _mean([step.saturated for step in taken]),
        "ratio": _mean([step.ratio for step in taken]),
        "gradient_ratio": _mean(ratios),
    }


def gain(shared: Bench, arm: Arm, seed: int) -> Row:
    """What three times the weight of one block does, against none, from half a run of A1 on.

    By block and bin: KD and e_t at the half, and the fall of the held-out error that 20 more steps
    with the block favoured bring beyond those of A1.
    """
    control, blocks = Arm("A1", arm.weight), shared.assessor.blocks
    student = Student.of(shared.unet)
    base = weigher_of(control, seed, blocks, None)(0, None, None)
    for _ in steps(shared, control, seed, student, constant(base), 0, HALF):
        pass
    before = signals_by_bin(shared.held, student.unet, shared.assessor)
    found = []
    for favoured in (None, *range(len(blocks))):
        other = copy.deepcopy(student)
        values = base.clone()
        if favoured is not None:
            values[favoured] *= BOOST
        for _ in steps(shared, control, seed, other, constant(values), HALF, HALF + MORE):
            pass
        found.append(shared.held.by_bin(shared.held.errors(other.unet, V)))
    gains = [[a - b for a, b in zip(found[0], other, strict=True)] for other in found[1:]]
    return {**before, "gain": [[float(f"{g:.4g}") for g in row] for row in gains]}


def _mean(values: list[float]) -> float:
    return round(sum(values) / len(values), 6) if values else math.nan


def _rounded(values: Tensor, digits: int = 4) -> list[float]:
    return [round(v, digits) for v in values.tolist()]
