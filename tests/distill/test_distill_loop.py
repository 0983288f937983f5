"""The loop: what it learns, tells, weighs; how it meets what is not finite; how it goes on."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recast.distill.fusion import Fusion, base_weights
from recast.distill.loop import distil
from recast.distill.signals import AssessorOutput
from recast.distill.step import BlockWeight, DistilStep, How, Tapped
from recast.errors import NotFinite, Refused
from recast.objective import EPS, FLOW, Net

NAMES = ("down_0", "mid", "up_0")


class Small(nn.Module):
    """Three convolutions as blocks, and the clock added in between."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        widths = (2, 6, 6, 6)
        self.blocks = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))
        self.clock, self.last = nn.Linear(1, 6), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = self.blocks[0](x) + self.clock(t.float().view(-1, 1))[:, :, None, None]
        x = self.blocks[2](self.blocks[1](x.tanh()).tanh())
        return self.last(x.tanh())


class Tap:
    def __init__(self, net: Small, skip: str = "") -> None:
        self.net, self.skip, self.found, self.handles = net, skip, {}, []

    def __enter__(self) -> None:
        for name, block in zip(NAMES, self.net.blocks, strict=True):
            hook = lambda m, i, o, name=name: self.found.__setitem__(name, o)  # noqa: E731
            self.handles.append(block.register_forward_hook(hook))

    def __exit__(self, *exception: Any) -> None:
        while self.handles:
            self.handles.pop().remove()

    def taken(self) -> dict[str, Tensor]:
        found, self.found = self.found, {}
        return {name: f for name, f in found.items() if name != self.skip}


@dataclass(frozen=True)
class Draw:
    x0: Tensor
    eps: Tensor
    t: Tensor
    x: Tensor
    condition: Any = None
    weight: Tensor | None = None


def draw(number: int, size: int = 8) -> Draw:
    made = torch.Generator().manual_seed(number)
    x0, eps = (torch.randn(size, 2, 4, 4, generator=made) for _ in range(2))
    t = torch.rand(size, generator=made) * 0.9
    return Draw(x0, eps, t, FLOW.noise(x0, eps, t))


def draws(first: int = 0) -> Iterator[Draw]:
    while True:
        yield draw(first)
        first += 1


class Pair:
    """A frozen eps teacher and a student that learns flow from it."""

    def __init__(self, skip: str = "", lr: float = 3e-3) -> None:
        net = Small()
        self.net = copy.deepcopy(net)
        net.requires_grad_(False)
        self.teacher = Tapped(lambda c: net, Tap(net), EPS)
        self.student = Tapped(self.bind, Tap(self.net, skip), FLOW)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr)

    def bind(self, condition: Any) -> Net:
        return self.net

    def run(self, n: int, **options: Any) -> list[DistilStep]:
        options = {"weigher": lambda step, signals, kd: torch.ones(3), **options}
        source = options.pop("draws", draws())
        loop = distil(self.student, self.teacher, source, optimizer=self.optimizer, **options)
        return list(islice(loop, n))


def test_it_learns_and_tells() -> None:
    pair = Pair(lr=1e-2)
    again = cycle([draw(0)])
    steps = pair.run(25, draws=again, block_weight=0.05, gradients_every=10)
    assert [s.step for s in steps] == list(range(1, 26))
    assert steps[-1].flow < 0.7 * steps[0].flow
    one = steps[0]
    assert one.loss == pytest.approx(one.flow + 0.05 * one.blocks)
    assert one.ratio == pytest.approx(0.05 * one.blocks / one.flow)
    assert one.kd.shape == one.values.shape == (3,)
    assert one.losses.shape == one.times.shape == (8,)
    measured = [s.step for s in steps if s.gradient_ratio is not None]
    assert measured == [1, 11, 21]
    assert all(s.gradient_ratio > 0 for s in steps if s.gradient_ratio is not None and s.step > 1)


def test_without_weight_no_block_is_asked_for() -> None:
    def never(step: int, signals: Any, kd: Tensor) -> Tensor:
        raise AssertionError("weighed")

    (step,) = Pair(skip="mid").run(1, block_weight=0.0, weigher=never)
    assert step.blocks == 0
    assert len(step.kd) == 0
    with pytest.raises(Refused, match="no block mid"):
        Pair(skip="mid").run(1)


def test_the_block_term_pulls_the_blocks_together() -> None:
    # rf on data moves the blocks; the block term holds them
    free, held = (
        Pair(lr=1e-2).run(20, block_weight=w, how=How(share=0.0, kd="spatial"))[-1]
        for w in (1e-6, 20.0)
    )
    assert held.kd.sum() < 0.5 * free.kd.sum()


def test_weights_reach_the_gradient() -> None:
    def only(which: int) -> Tensor:
        pair = Pair()
        values = torch.zeros(3).index_fill(0, torch.tensor([which]), 1.0)
        # from the first step on the student differs, so that KD has a gradient
        with torch.no_grad():
            pair.net.blocks[0].weight.add_(0.1)
        pair.run(1, block_weight=1e6, weigher=lambda *a: values, clip=0.0)
        return torch.stack([b.weight.grad.norm() for b in pair.net.blocks])

    first, last = only(0), only(2)
    assert first[2] < 1e-3 * first[0]  # KD of the first block moves nothing behind it
    assert last[2] > 1e3 * first[2]


def test_auto_sets_the_weight_once_for_a_ratio_of_a_tenth() -> None:
    auto = BlockWeight("auto", warmup=5)
    with_move = Pair()
    with torch.no_grad():
        with_move.net.blocks[0].weight.add_(0.1)
    steps = with_move.run(8, block_weight=auto)
    assert [s.block_weight for s in steps[:5]] == [0.05] * 5
    assert len({s.block_weight for s in steps[5:]}) == 1
    before = sum(s.flow for s in steps[:5]) / sum(s.blocks for s in steps[:5])
    assert steps[5].block_weight == pytest.approx(0.1 * before)


def test_signals_get_the_teachers_time_and_both_features() -> None:
    met = []

    def assess(mine: Any, theirs: Any, t: Tensor) -> AssessorOutput:
        met.append((mine.keys(), theirs.keys(), t))
        ones = torch.ones(len(t), 3)
        return AssessorOutput(NAMES, ones, ones, ones, torch.ones(len(t)).bool())

    fusion = Fusion(base_weights(NAMES))
    (step,) = Pair().run(1, assess=assess, weigher=lambda s, output, kd: fusion.weigh(output))
    mine, theirs, t = met[0]
    assert tuple(mine) == tuple(theirs) == NAMES
    alpha, sigma = FLOW.path(draw(0).t)
    assert torch.allclose(t, EPS.path.time(alpha, sigma))
    assert step.values.sum().item() == pytest.approx(sum(fusion.weights.values()))


def test_importance_weights_count() -> None:
    plain = draw(0)
    (even,) = Pair().run(1, draws=iter([plain]), block_weight=0.0)
    w = torch.tensor([8.0] + [0.0] * 7)
    (first,) = Pair().run(
        1, draws=iter([Draw(plain.x0, plain.eps, plain.t, plain.x, None, w)]), block_weight=0.0
    )
    assert first.flow == pytest.approx(first.losses[0].item(), rel=1e-3)
    assert torch.equal(first.losses, even.losses)


def test_accumulation_is_one_larger_batch() -> None:
    one, two = Pair(), Pair()
    a, b = draw(0), draw(1)
    both = Draw(*(torch.cat([getattr(a, k), getattr(b, k)]) for k in ("x0", "eps", "t", "x")))
    (x,) = one.run(1, draws=iter([a, b]), accumulate=2)
    (y,) = two.run(1, draws=iter([both]))
    assert x.loss == pytest.approx(y.loss, rel=1e-5)
    assert torch.allclose(x.losses, y.losses)
    for p, q in zip(one.net.parameters(), two.net.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, atol=1e-6)


def test_what_is_not_finite_is_skipped_and_three_in_a_row_end_the_run() -> None:
    pair = Pair()
    before = copy.deepcopy(pair.net.state_dict())
    broken = Draw(*(torch.full_like(getattr(draw(0), k), math.nan) for k in ("x0", "eps")),
                  draw(0).t, draw(0).x)  # fmt: skip
    source = iter([broken, broken, draw(1)])
    how = How(share=0.0)
    steps = pair.run(2, draws=source, how=how)
    assert [s.skipped for s in steps] == [1, 2]
    assert all(torch.equal(before[k], v) for k, v in pair.net.state_dict().items())
    assert pair.run(1, draws=source, how=how, skipped=2)[0].skipped == 0
    with pytest.raises(NotFinite, match="the 3"):
        pair.run(3, draws=iter([broken] * 3), how=how)


def test_an_overflow_of_scaled_gradients_is_survived() -> None:
    pair = Pair()
    before = copy.deepcopy(pair.net.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    plain = draw(0)
    heavy = Draw(plain.x0, plain.eps, plain.t, plain.x, None, torch.full((8,), 64.0))
    steps = pair.run(3, draws=iter([heavy] * 3), scaler=scaler, block_weight=0.0)
    assert [s.scale for s in steps] == [2.0**127, 2.0**126, 2.0**125]
    assert all(s.skipped == 0 for s in steps)
    assert all(torch.equal(before[k], v) for k, v in pair.net.state_dict().items())


def test_it_goes_on_bit_for_bit() -> None:
    whole, parts = Pair(), Pair()
    whole.run(6)
    parts.run(3)
    parts.run(3, draws=draws(3), done=3)
    for p, q in zip(whole.net.parameters(), parts.net.parameters(), strict=True):
        assert torch.equal(p, q)
