"""Several processes as the loop sees them: threads that exchange what processes would."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tests.distill.test_distill_loop import NAMES, Pair, draws
from torch import Tensor

from recast import processes
from recast.distill.fusion import Fused, Fusion, base_weights
from recast.distill.losses import LocalHeads
from recast.distill.signals import AssessorOutput
from recast.distill.step import BlockWeight, DistilStep, How
from recast.train.team import Team

COUNT = 2
WHO = threading.local()


class Threads(Team):
    """A team of threads; `held` is what lies on the table."""

    def __init__(self, table: threading.Barrier, held: dict[int, Any]) -> None:
        super().__init__(COUNT)
        self.table, self.held = table, held

    def exchange(self, mine: Any) -> list[Any]:
        self.held[WHO.rank] = mine
        self.table.wait(30)
        found = [self.held[k] for k in range(COUNT)]
        self.table.wait(30)
        return found

    def take(self, parameters: Any) -> None:
        parameters = list(parameters)
        gradients = [p.grad.clone() for p in parameters]
        for theirs in self.exchange(gradients):
            for p, piece in zip(parameters, theirs, strict=True):
                self._add(p, piece)
        for p in parameters:
            p.grad = None

    def woven(self, mine: list[Any]) -> list[Any]:
        return [value for round_ in zip(*self.exchange(mine), strict=True) for value in round_]


def assessed(mine: Any, theirs: Any, t: Tensor) -> AssessorOutput:
    """Signals that differ from sample to sample; half of the samples count."""
    e_t = torch.stack([each.mean((1, 2, 3)) for each in mine.values()], 1).detach().abs()
    return AssessorOutput(NAMES, e_t, e_t / 2, 1 - e_t / 4, t < 0.5)


def course(accumulate: int, source: Iterator[Any], team: Team | None) -> tuple[list, Pair, Any]:
    """Five steps with everything that remembers what it saw."""
    pair, weight = Pair(), BlockWeight("auto", 2)
    fusion = Fusion(base_weights(NAMES))
    heads = LocalHeads({"down_0": 6, "mid": 6, "up_0": 6}, 2)
    pair.optimizer.add_param_group({"params": list(heads.parameters())})

    def weigh(step: int, signals: AssessorOutput | None, kd: Tensor) -> Fused:
        assert signals is not None
        return fusion.weigh(signals)

    steps = pair.run(
        5, draws=source, weigher=weigh, assess=assessed, block_weight=weight, heads=heads,
        how=How(local_weight=0.3), accumulate=accumulate, gradients_every=2, team=team,
    )  # fmt: skip
    return steps, pair, (fusion.state_dict(), weight.state_dict())


def told(steps: list[DistilStep]) -> list[Any]:
    tensors = [(s.kd, s.values, s.raw, s.spread, s.losses, s.times) for s in steps]
    numbers = [(s.loss, s.grad_norm, s.block_weight, s.gradient_ratio) for s in steps]
    return [[each.tolist() for each in some] for some in tensors] + numbers


def test_a_team_takes_the_steps_of_one_that_accumulates(monkeypatch: pytest.MonkeyPatch) -> None:
    alone, pair, held = course(4, draws(), None)
    table, given = threading.Barrier(COUNT), {}
    monkeypatch.setattr(processes, "rank", lambda: getattr(WHO, "rank", 0))

    def take_part(rank: int) -> tuple[list, Pair, Any]:
        WHO.rank = rank
        mine = (draw for number, draw in enumerate(draws()) if number % COUNT == rank)
        return course(2, mine, Threads(table, given))

    with ThreadPoolExecutor(COUNT) as pool:
        both = list(pool.map(take_part, range(COUNT)))
    for steps, theirs, state in both:
        assert told(steps) == told(alone)
        assert repr(state) == repr(held)
        for a, b in zip(theirs.net.parameters(), pair.net.parameters(), strict=True):
            assert torch.equal(a, b)
