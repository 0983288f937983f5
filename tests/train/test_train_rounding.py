"""Rounding at random is right on average, and stepping piece by piece is stepping at once."""

import pytest
import torch
from torch import nn

from recast.optim import build
from recast.train import rounding
from recast.train.rounding import move, rounded

torch.set_num_threads(1)


@pytest.mark.parametrize("value", [1.001, -1.001, 3.0e-5, -2.7182817, 1.0e-39, 65504.0])
def test_rounding_is_unbiased_and_goes_to_a_neighbour(value: float) -> None:
    torch.manual_seed(0)
    many = torch.full((200_000,), value)
    found = rounded(many)
    assert found.dtype == torch.bfloat16
    near = torch.tensor(value).view(torch.int32)
    ends = torch.stack([near & -65536, (near & -65536) + 65536]).view(torch.float32)
    assert set(found.float().unique().tolist()) <= set(ends.tolist())
    width = (ends[1] - ends[0]).abs().item()
    off = found.double().mean().item() - many[0].double().item()
    assert abs(off) < 5 * 0.5 * width / len(many) ** 0.5
    nearest = abs(many.bfloat16().double()[0].item() - many[0].double().item())
    if nearest > 0.05 * width:
        assert abs(off) < 0.1 * nearest


def test_what_bf16_holds_exactly_stays_and_so_does_what_is_no_number() -> None:
    exact = torch.tensor([0.0, -0.0, 1.0, -3.5, torch.inf, -torch.inf, torch.nan])
    for _ in range(20):
        found = rounded(exact).float()
        assert torch.equal(found.isnan(), exact.isnan())
        assert torch.equal(found[:-1], exact[:-1])


def test_small_steps_count_only_if_rounded_at_random() -> None:
    """1,000 weights of 1, 200 steps of 1e-4: the next bf16 number below 1 is 4e-3 away."""
    torch.manual_seed(0)
    ends = []
    for step in (lambda o: o.step(), move):
        weight = nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
        optimizer = torch.optim.SGD([weight], 1e-4)
        for _ in range(200):
            weight.grad = torch.ones_like(weight)
            step(optimizer)
        assert weight.dtype == torch.bfloat16
        ends.append(weight.float().mean().item())
    assert ends[0] == 1.0
    assert ends[1] == pytest.approx(1 - 0.02, abs=2e-3)


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "saveus", "dadaptlion"])
def test_piece_by_piece_is_all_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32, where nothing is rounded, to the bit; counters in the groups included."""
    monkeypatch.setattr(rounding, "PIECE", 50)
    together = name == "dadaptlion"
    runs = []
    for step in (lambda o: o.step(), lambda o: move(o, together)):
        gen = torch.Generator().manual_seed(0)
        weights = [nn.Parameter(torch.randn(s, generator=gen)) for s in [(6, 5), (30,), (7, 8)]]
        groups = [{"params": weights[:2]}, {"params": weights[2:], "lr": 1e-2}]
        optimizer = build(name, groups)
        for _ in range(4):
            for weight in weights:
                weight.grad = torch.randn(weight.shape, generator=gen)
            step(optimizer)
        facts = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        runs.append(([w.detach() for w in weights], facts))
    (one, facts), (two, others) = runs
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert repr(facts) == repr(others)


def test_moments_of_bf16_weights_are_fp32_between_steps() -> None:
    weight = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    optimizer = build("adamw", [weight])
    weight.grad = torch.ones_like(weight)
    move(optimizer)
    assert optimizer.state[weight]["exp_avg"].dtype == torch.float32
    assert (weight.dtype, weight.grad) == (torch.bfloat16, None)
