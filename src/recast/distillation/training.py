"""The training stage of a distillation: steps, their log, states, and proven files on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from recast import processes
from recast.distill.fusion import MUCH, Fused, warned
from recast.distill.loop import distil
from recast.distill.losses import LocalHeads
from recast.distill.sampler import TimeSampler
from recast.distill.step import BlockWeight, DistilStep, How
from recast.distill.taps import FeatureTap
from recast.distillation import files
from recast.distillation.config import Config
from recast.distillation.folder import LOG
from recast.distillation.guidance import Guide
from recast.distillation.material import Material, draw, draws
from recast.distillation.networks import Pair, share_of
from recast.distillation.sharing import met, saved
from recast.errors import Stopped
from recast.events import Event, Note, Stage, Tick
from recast.objective import EPS
from recast.optim import build
from recast.train import append, latest, load, log_length, open_log, save, schedule_of, team
from recast.train.state import prune

DECILES = 10
EVER = 10**6  # states kept until a file is proven
PROBE = 1 << 40  # number of the draw that files are compared on: far from any of training
SATURATED_EVERY = 100  # steps from one warning to the next


@dataclass
class Course:
    """All that changes from step to step."""

    pair: Pair
    config: Config
    out: Path
    digest: str
    guide: Guide
    optimizer: Optimizer
    parameters: dict[str, nn.Parameter]
    heads: LocalHeads | None
    weight: BlockWeight
    scaler: torch.amp.GradScaler | None
    done: int = 0
    skipped: int = 0
    length: int = 0
    identity: dict[str, str] = field(default_factory=dict)

    @classmethod
    def begun(cls, pair: Pair, config: Config, out: Path, digest: str, guide: Guide) -> Course:
        """The optimizer and what goes with it, before the first step."""
        how, device = config.optimizer, pair.model.device
        parameters, heads = dict(pair.parameters), None
        if config.blocks.local_weight:
            latent = pair.model.layout.unet["in_channels"]
            heads = LocalHeads(widths_of(pair.tap), latent).to(device)
            parameters |= {f"heads.{name}": p for name, p in heads.named_parameters()}
        optimizer = build(
            "adamw", parameters.values(), lr=how.lr, weight_decay=how.weight_decay,
            betas=tuple(how.betas),
        )  # fmt: skip
        half = pair.model.dtype == torch.float16
        return cls(
            pair, config, out, digest, guide, optimizer, parameters, heads,
            BlockWeight(config.blocks.weight, config.blocks.auto_warmup),
            torch.amp.GradScaler(device.type) if half else None, identity={"run": digest},
        )  # fmt: skip

    def resume(self) -> Iterator[Note]:
        """Go on from the newest whole state, if there is any."""
        if not (found := latest(self.out / "state")):
            return
        for path in found.damaged:
            yield Note(f"{path} is damaged and passed over; going on from step {found.step}.")
        self.done, extra = load(
            found.path, parameters=self.parameters, optimizer=self.optimizer, identity=self.identity
        )
        self.skipped, self.length = extra["skipped"], extra["log"]
        self.guide.fusion.load_state_dict(extra["fusion"])
        self.weight.load_state_dict(extra["block_weight"])
        if self.scaler is not None:
            self.scaler.load_state_dict(extra["scaler"])

    def save(self, step: DistilStep, log: IO[bytes]) -> None:
        """Save the state after a step; the schedule and the sampler are functions of the step."""
        extra = {
            "skipped": step.skipped,
            "log": log_length(log),
            "fusion": self.guide.fusion.state_dict(),
            "block_weight": self.weight.state_dict(),
            "sampler": {"seed": self.config.run.seed, "draws": self.first(step.step)},
            "scheduler": {"name": self.config.optimizer.schedule, "step": step.step},
            **({} if self.scaler is None else {"scaler": self.scaler.state_dict()}),
        }
        save(
            self.out / "state", step=step.step, parameters=self.parameters,
            optimizer=self.optimizer, identity=self.identity, extra=extra, keep=EVER,
        )  # fmt: skip

    def first(self, done: int) -> int:
        """The number of the draw that step `done` + 1 begins with."""
        return done * self.config.run.accumulate


def learn(
    course: Course, material: Material, times: TimeSampler, stopped: Callable[[], int]
) -> Iterator[Event]:
    """Take the steps that are left; yields progress.

    Raises NotFinite when steps stop being finite (the last state stays), CheckFailed when a file is
    not the student, Stopped on a signal.
    """
    config, total = course.config, course.config.run.steps
    yield from course.resume()
    if not processes.first():
        along(course, material, times, stopped)
        return
    yield from settle(course, material, times)
    yield Stage("distil", total, "steps", course.done)
    if course.done >= total:
        return
    with open_log(course.out / LOG, course.length) as log:
        for step in steps(course, material, times):
            append(log, record(step, course))
            yield Tick(step.step, step.loss)
            yield from remarks(step)
            last = step.step == total
            signal = 0 if last else met(stopped())
            due = step.step % config.save.every == 0 and not step.skipped
            if due or last or signal:
                course.save(step, log)
            if due or last:
                yield from settle(course, material, times, step.step)
            if signal:
                saved()
                raise halted(signal, step)
            if last:
                return


def along(
    course: Course, material: Material, times: TimeSampler, stopped: Callable[[], int]
) -> None:
    """Take the steps that the first process takes, until it stops; writes nothing."""
    total = course.config.run.steps
    for step in steps(course, material, times) if course.done < total else ():
        if step.step == total:
            return
        if signal := met(stopped()):
            saved()
            raise halted(signal, step)


def halted(signal: int, step: DistilStep) -> Stopped:
    return Stopped(signal, f"stopped after step {step.step}; the same command goes on there.")


def steps(course: Course, material: Material, times: TimeSampler) -> Iterator[DistilStep]:
    """The steps of a course, one after the other, from where it stands."""
    config, pair, guide = course.config, course.pair, course.guide
    how, device = config.optimizer, str(pair.model.device)
    half = pair.model.dtype != torch.float32
    given = draws(material, config, pair.objective, times, device, first=course.first(course.done))
    return distil(
        pair.student,
        pair.teacher,
        given,
        optimizer=course.optimizer,
        weigher=guide.weigh,
        block_weight=course.weight,
        how=parts_of(config),
        assess=guide.assess if guide.assessor is not None else None,
        heads=course.heads,
        accumulate=config.run.accumulate // processes.count(),
        clip=how.clip,
        schedule=schedule_of(how.schedule, config.run.steps, rise=how.warmup),
        gradients_every=config.blocks.gradients_every,
        done=course.done,
        skipped=course.skipped,
        autocast=pair.model.dtype if half else None,
        scaler=course.scaler,
        team=team(),
    )


def settle(
    course: Course, material: Material, times: TimeSampler, step: int | None = None
) -> Iterator[Event]:
    """Write and prove the file of the newest state unless it is proven, then prune what is older.

    A run that was killed between state and file makes up for the file first.
    """
    step = course.done if step is None else step
    config, total = course.config, course.config.run.steps
    due = step and (step % config.save.every == 0 or step == total)
    if not due:
        return
    path = files.model_path(course.out, step, total)
    known = files.good(course.out)
    if not (path.exists() and known.get("file") == path.name and known.get("step") == step):
        probe = draw(
            material, config, course.pair.objective, times, str(course.pair.model.device), PROBE
        )
        proof = files.checkpoint(course.pair, config, course.out, step, probe, course.digest)
        yield Note(
            f"Step {step}: {proof.file} has {proof.tensors} tensors, {proof.changed} of the UNet's "
            f"{proof.unet} changed, answers as the student within {proof.error:.0e} "
            f"(rounding moves it by {proof.rounded:.0e}); sha256 {proof.sha256[:12]}."
        )
    files.prune(course.out, config.save.keep)
    prune(course.out / "state", config.save.keep)


def parts_of(config: Config) -> How:
    """What is learned and how the parts count."""
    how = config.blocks
    return How(share_of(config), config.target.control, how.kd, how.kd_weight, how.local_weight)


def widths_of(tap: FeatureTap) -> dict[str, int]:
    """How many channels each tapped block has."""
    told = tap.fingerprint(EPS)["channels"].split(",")
    return dict(zip(tap.blocks, map(int, told), strict=True))


def remarks(step: DistilStep) -> Iterator[Note]:
    """What the user should know of a step."""
    if step.skipped:
        yield Note(f"Step {step.step} is skipped: loss {step.loss}, norm {step.grad_norm}.")
    if step.saturated > MUCH and step.step % SATURATED_EVERY == 1:
        said = warned(Fused(step.values, step.raw, step.saturated, step.spread))
        yield Note(f"Step {step.step}: {said}")


def record(step: DistilStep, course: Course) -> dict[str, Any]:
    """A step as a line of the log."""
    names = tuple(course.guide.fusion.weights)

    def by_block(values: Tensor) -> dict[str, float]:
        return dict(zip(names, values.tolist(), strict=True)) if len(values) else {}

    return {
        "step": step.step, "loss": step.loss, "flow": step.flow, "blocks": step.blocks,
        "block_weight": step.block_weight, "R": step.ratio,
        "gradient_ratio": step.gradient_ratio, "lambda": by_block(step.values),
        "raw": by_block(step.raw), "spread": by_block(step.spread), "kd": by_block(step.kd),
        "saturated": step.saturated, "bins": deciles(step.losses, step.times),
        "grad_norm": step.grad_norm, "lr": step.lr, "skipped": step.skipped,
        "scale": step.scale, "seconds": round(step.seconds, 4),
    }  # fmt: skip


def deciles(losses: Tensor, times: Tensor) -> list[float | None]:
    """The mean loss in each tenth of the path; None where no sample lay."""
    k = (times * DECILES).long().clamp(0, DECILES - 1)
    found = [losses[k == b] for b in range(DECILES)]
    return [each.mean().item() if len(each) else None for each in found]
