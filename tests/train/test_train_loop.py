"""The loop learns, accumulates, clips, schedules, and meets numbers that are not finite."""

from dataclasses import replace
from itertools import islice

import pytest
import torch
from tests.train.tiny_run import Tiny, draw, stream

from recast.errors import Diverged
from recast.objective import FLOW
from recast.train import SCHEDULES, Ema, criterion, from_data, rate, train, warmup

torch.set_num_threads(1)
LOSS = criterion(from_data(FLOW), FLOW)


def start(lr: float = 1e-2) -> tuple[Tiny, torch.optim.Optimizer]:
    net = Tiny()
    return net, torch.optim.AdamW(net.parameters(), lr, weight_decay=0.0)


def test_it_learns_and_tells_what_it_did() -> None:
    net, optimizer = start()
    steps = list(islice(train(net.student, stream(), LOSS, optimizer), 60))
    assert [s.step for s in steps] == list(range(1, 61))
    assert sum(s.loss for s in steps[-10:]) < 0.7 * sum(s.loss for s in steps[:10])
    last = steps[-1]
    assert torch.equal(last.times, draw(59).t)
    assert last.losses.mean().item() == pytest.approx(last.loss, rel=1e-5)
    assert (last.lr, last.d, last.skipped) == (1e-2, 1.0, 0)


def test_accumulation_is_one_larger_batch() -> None:
    (one, opt_one), (two, opt_two) = start(), start()
    halves = [draw(0), draw(1)]
    both = {k: torch.cat([getattr(h, k) for h in halves]) for k in ("x0", "eps", "t", "x")}
    whole = replace(halves[0], **both)
    (a,) = train(one.student, halves, LOSS, opt_one, accumulate=2)
    (b,) = train(two.student, [whole], LOSS, opt_two)
    assert a.loss == pytest.approx(b.loss, rel=1e-5)
    assert torch.allclose(a.losses, b.losses, rtol=1e-5)
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-5)


def test_the_norm_told_is_the_one_before_clipping() -> None:
    net, optimizer = start()
    (free,) = train(net.student, [draw(0)], LOSS, optimizer, clip=None)
    net, optimizer = start()
    (held,) = train(net.student, [draw(0)], LOSS, optimizer, clip=1e-3)
    norm = torch.cat([p.grad.flatten() for p in net.parameters()]).norm().item()
    assert free.grad_norm == held.grad_norm > 1e-3
    assert norm == pytest.approx(1e-3, rel=1e-3)


def test_schedules_are_functions_of_the_step() -> None:
    assert [SCHEDULES["linear"](4)(k) for k in range(6)] == [1, 0.75, 0.5, 0.25, 0, 0]
    assert SCHEDULES["constant"](4)(99) == 1
    assert SCHEDULES["cosine"](4)(2) == pytest.approx(0.5)
    assert [warmup(SCHEDULES["linear"](2), 2)(k) for k in range(4)] == [0.5, 1.0, 1.0, 0.5]
    net, optimizer = start()
    run = train(net.student, stream(), LOSS, optimizer, schedule=SCHEDULES["linear"](4))
    assert [s.lr for s in islice(run, 3)] == [1e-2, 0.75e-2, 0.5e-2]
    assert rate(optimizer) == (0.5e-2, 1.0)


def test_a_bad_step_changes_nothing_and_three_stop_the_run() -> None:
    net, optimizer = start()
    ema = Ema(list(net.parameters()))
    bad = replace(draw(9), x0=torch.full((4, 4, 4, 4), torch.inf))
    run = train(net.student, [draw(0), bad, bad, draw(1), bad, bad, bad], LOSS, optimizer, ema=ema)
    assert next(run).skipped == 0
    before = [p.detach().clone() for p in net.parameters()]
    assert [next(run).skipped, next(run).skipped] == [1, 2]
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    assert optimizer.state[net.two.bias]["step"] == 1
    assert ema.count == 1
    assert next(run).skipped == 0
    assert [next(run).skipped, next(run).skipped] == [1, 2]
    with pytest.raises(Diverged, match="step 7"):
        next(run)


def test_unused_parameters_get_zero_gradients() -> None:
    net, _ = start()
    idle = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([*net.parameters(), idle], 0.1)
    list(train(net.student, [draw(0)], LOSS, optimizer))
    assert torch.equal(idle, torch.ones(2))
    assert torch.equal(idle.grad, torch.zeros(2))


def test_autocast_runs_the_network_in_bf16_and_the_loss_in_fp32() -> None:
    net, optimizer = start()
    seen = []

    def student(d):
        output = net.student(d)
        seen.append(output.dtype)
        return output

    (step,) = train(student, [draw(0)], LOSS, optimizer, autocast=torch.bfloat16)
    assert seen == [torch.bfloat16]
    assert step.losses.dtype == torch.float32


def test_the_average_follows_and_is_shown_without_a_trace() -> None:
    net, optimizer = start()
    ema = Ema(list(net.parameters()), decay=0.5)
    list(islice(train(net.student, stream(), LOSS, optimizer, ema=ema), 3))
    training = net.one.weight.detach().clone()
    with ema.shown():
        assert torch.equal(net.one.weight, ema.tensors[0])
        assert not torch.equal(net.one.weight, training)
    assert torch.equal(net.one.weight, training)
