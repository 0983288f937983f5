"""What taps and assessor cost a step of distillation, on the pocket checkpoints, in CPU time.

    python bench/distill_overhead.py [pocket-15|pocket-xl ...] [--rounds 8] [--batch 16]

plain     teacher and student answer, the flow loss steps
blocks    the same, both tapped, with the spatial distance of all blocks in the loss
assessed  the same, with the blocks' weights by an assessor of 100 bins and relative signals

The three take turns, so that what else the machine does meets them alike; medians are compared. An
untrained assessor costs what a trained one does.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace

import torch

from recast import pocket
from recast.distill.assessor import Assessor, Shape, widths
from recast.distill.fusion import Fusion, base_weights
from recast.distill.loop import distil
from recast.distill.signals import assess
from recast.distill.step import BlockWeight, How, Tapped
from recast.distill.taps import FeatureTap, pool
from recast.model import open_model
from recast.objective import FLOW
from recast.train import Draw, noised, seeded

BINS = 100


class Bench:
    """A teacher, its copy, and a step of each kind."""

    def __init__(self, name: str, batch: int) -> None:
        self.model = open_model(pocket.path(name), parts=("unet", "te1", "te2"))
        unet = deepcopy(self.model.unet).requires_grad_(True)
        learner = replace(self.model, parts={"unet": unet})
        self.batch, self.condition = batch, self.model.condition(["a red circle"])
        self.tap = FeatureTap(self.model.unet)
        self.teacher = Tapped(self.model.net, self.tap, self.model.objective)
        self.student = Tapped(lambda c: learner.net(c, FLOW), FeatureTap(unet), FLOW)
        self.optimizer = torch.optim.AdamW(unet.parameters(), 1e-5)
        self.fusion = Fusion(base_weights(self.tap.blocks))
        with self.tap, torch.no_grad():
            draw = next(self.draws())
            self.model.net(draw.condition)(draw.x, draw.t)
            shape = Shape(widths(pool(self.tap.taken())), bins=BINS)
        self.assessor = Assessor(shape, torch.Generator().manual_seed(0))

    def draws(self) -> Iterator[Draw]:
        generator = seeded(0, "overhead")
        shape = (self.batch, *self.model.latent_shape())
        while True:
            x0, eps = (torch.randn(shape, generator=generator) for _ in range(2))
            t = torch.rand(self.batch, generator=generator)
            yield noised(FLOW, x0, t, eps, self.condition)

    def steps(self, kind: str) -> Iterator[float]:
        """CPU seconds of one step after another."""
        assessed = kind == "assessed"
        base = self.fusion.base.float()
        run = distil(
            self.student, self.teacher, self.draws(), optimizer=self.optimizer,
            weigher=lambda step, signals, kd: self.fusion.weigh(signals) if signals else base,
            block_weight=BlockWeight(0.0 if kind == "plain" else 0.05), how=How(kd="spatial"),
            assess=self.assess if assessed else None,
        )  # fmt: skip
        while True:
            began = time.process_time()
            next(run)
            yield time.process_time() - began

    def assess(self, mine, theirs, t):  # type: ignore[no-untyped-def]
        student = pool({name: each.detach() for name, each in mine.items()})
        return assess(self.assessor, student, t, teacher_pooled=pool(theirs))


def measured(name: str, batch: int, rounds: int) -> dict[str, float]:
    """Median CPU seconds of a step of each kind; the first of each is left out."""
    bench = Bench(name, batch)
    found: dict[str, list[float]] = {"plain": [], "blocks": [], "assessed": []}
    for number in range(rounds + 1):
        for kind in found:
            seconds = next(bench.steps(kind))
            if number:
                found[kind].append(seconds)
    return {kind: statistics.median(each) for kind, each in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["pocket-15"])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.models:
        found = measured(name, options.batch, options.rounds)
        plain = found["plain"]
        told = ", ".join(
            f"{kind} {seconds:.3f} s"
            + ("" if kind == "plain" else f" (+{seconds / plain - 1:.1%})")
            for kind, seconds in found.items()
        )
        print(f"{name}, batch {options.batch}: {told}")


if __name__ == "__main__":
    main()
