"""The learned weight finds the mean loss of every noise level, sample by sample, and resumes."""

from pathlib import Path

import pytest
import torch
from tests.train.tiny_run import Tiny, stream

from recast.objective import EPS, FLOW, V_ZSNR
from recast.train import Aware, Learned, criterion, from_data, load, noised, save, seeded, train
from recast.train.draws import Draw

torch.set_num_threads(1)


def levels(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return FLOW.path(t)


def test_it_begins_as_the_plain_loss_and_is_finite_at_both_ends() -> None:
    learned = Learned()
    losses = torch.rand(5)
    for objective in (EPS, V_ZSNR, FLOW):
        at = objective.path(torch.linspace(0, 1, 5))
        assert torch.equal(learned.loss(losses, *at), losses)
        learned.gain.data.fill_(1.0)
        assert torch.isfinite(learned(*at)).all()
        learned.gain.data.zero_()


def test_its_exponential_becomes_the_mean_loss_of_each_level() -> None:
    """The oracle: E[L | t] = 0.05 + 4 t², noisy, in batches of 16 that mix all levels."""
    learned = Learned()
    optimizer = torch.optim.AdamW(learned.parameters(), 2e-2, betas=(0.9, 0.99), weight_decay=0.0)
    for step in range(1500):
        gen = seeded(step)
        t = torch.rand(16, generator=gen)
        losses = (0.05 + 4 * t.square()) * (0.5 + torch.rand(16, generator=gen))
        optimizer.zero_grad()
        learned.loss(losses, *levels(t)).mean().backward()
        optimizer.step()
    t = torch.linspace(0.1, 0.95, 18)
    wanted = (0.05 + 4 * t.square()).log()
    assert (learned(*levels(t)) - wanted).abs().max() < 0.5
    assert (learned(*levels(t)) - wanted).abs().mean() < 0.2


def run(steps: int, state: Path | None = None, resume: Path | None = None) -> list[float]:
    """Losses of a run with a learned weight; saves at `state`, or goes on from `resume`."""
    net, learned = Tiny(), Learned()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    partner = torch.optim.AdamW(learned.parameters(), 1e-1)
    own, both = dict(net.named_parameters()), [*learned.named_parameters()]
    done = 0
    if resume:
        from recast.train import restore

        done, extra = load(resume, parameters=own, optimizer=optimizer)
        learned.load_state_dict(extra["weights"])
        restore(partner, extra["optimizer"])
    loss = criterion(from_data(FLOW), FLOW, learned=learned)
    found = []
    for step in train(net.student, stream(done), loss, optimizer, partner=partner, done=done):
        found.append(step.loss)
        if state and step.step == 3:
            extra = {"weights": dict(learned.state_dict()), "optimizer": partner.state_dict()}
            save(state, step=3, parameters=own, optimizer=optimizer, extra=extra)
        if step.step == steps:
            break
    assert all(torch.isfinite(p).all() for _, p in both)
    assert learned.gain != 0
    return found


def test_it_is_restored_exactly(tmp_path: Path) -> None:
    whole = run(6, state=tmp_path)
    assert run(6, resume=tmp_path / "step00000003") == whole[3:]


def test_aware_times_even_out_a_known_loss() -> None:
    """Oracle: L = t² + 0.1; the density becomes proportional to it, the estimate stays unbiased."""
    aware = Aware(floor=0.0, bins=16)
    for step in range(60):
        t, weight = aware.draw(64, seeded(step))
        aware.update(t, t.square() + 0.1)
    p = aware.probabilities()
    edges = torch.arange(17, dtype=torch.float64) / 16
    mass = (edges**3 / 3 + 0.1 * edges).diff()
    torch.testing.assert_close(p, mass / mass.sum(), rtol=0.06, atol=0)
    t, weight = aware.draw(4096, seeded("estimate"))
    estimate = weight * (t.square() + 0.1)
    assert estimate.mean().item() == pytest.approx(1 / 3 + 0.1, rel=0.01)
    assert estimate.std() < 0.1 * (t.square() + 0.1).std()


def test_aware_times_begin_uniform_keep_their_floor_and_know_what_is_unseen() -> None:
    aware = Aware(floor=0.2, bins=10)
    t, weight = aware.draw(10, seeded(0))
    assert sorted((t * 10).int().tolist()) == list(range(10))
    assert torch.equal(weight, torch.ones(10))
    aware.update(torch.tensor([0.05, 0.15]), torch.tensor([100.0, 0.0]))
    p = aware.probabilities()
    assert p.sum().item() == pytest.approx(1)
    assert p[1] == pytest.approx(0.2 / 10)
    assert p[2] == pytest.approx(0.02 + 0.8 * 50 / 500)
    aware.update(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0]))
    assert aware.seen.tolist() == [True, True] + [False] * 7 + [True]


def test_aware_times_resume_exactly() -> None:
    one, two = Aware(), Aware()
    for step in range(5):
        t, _ = one.draw(8, seeded(step))
        one.update(t, t + 0.1)
    two.restore(one.state())
    one_next, two_next = one.draw(8, seeded(9)), two.draw(8, seeded(9))
    assert torch.equal(one_next[0], two_next[0])
    assert torch.equal(one_next[1], two_next[1])
    two.update(*two_next)
    assert not torch.equal(one.squares, two.squares)


def test_the_loop_evens_out_what_draws_weigh() -> None:
    net = Tiny()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    d = next(stream())
    weight = torch.tensor([0.0, 0.0, 0.0, 4.0])
    heavy = Draw(d.x0, d.eps, d.t, d.x, weight=weight)
    (step,) = train(net.student, [heavy], criterion(from_data(FLOW), FLOW), optimizer)
    assert step.loss == pytest.approx(step.losses[3].item())
    assert torch.equal(step.weighted, step.losses)
    assert noised(FLOW, d.x0, d.t, d.eps).weight is None
