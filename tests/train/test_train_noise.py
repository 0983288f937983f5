"""Noise options keep their promises: spectrum, mean, pairing of least cost, unmoved target."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch

from recast.errors import Refused
from recast.objective import EPS, FLOW
from recast.train import check, noised, seeded
from recast.train.assign import assign
from recast.train.noise import multires, offset, paired, perturbed


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded("noise", seed))


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_assignment_is_the_best_of_all_permutations(n: int) -> None:
    for seed in range(6):
        cost = np.random.default_rng(seed).normal(size=(n, n)).round(seed)  # coarse ones have ties
        found = assign(cost)
        assert sorted(found) == list(range(n))
        best = min(sum(cost[i, p[i]] for i in range(n)) for p in permutations(range(n)))
        assert sum(cost[i, found[i]] for i in range(n)) == pytest.approx(best)


def test_pairs_are_the_same_noises_nearer_to_their_data() -> None:
    x0, eps = normal(16, 4, 4, 4), normal(16, 4, 4, 4, seed=1)
    dealt = paired(eps, x0)
    assert {row.sum().item() for row in dealt} == {row.sum().item() for row in eps}
    assert (dealt - x0).square().sum() < (eps - x0).square().sum() - 10
    assert torch.equal(paired(eps[:1], x0[:1]), eps[:1])
    hidden = normal(16, 4, 4, 4, seed=2)
    order = torch.randperm(16, generator=seeded("order"))
    assert torch.equal(paired(hidden[order], hidden), hidden)


def test_multires_is_coarser_and_as_strong() -> None:
    eps = normal(64, 4, 16, 16)
    one = multires(eps, 6, 0.5, seeded("multires"))
    assert torch.allclose(one.flatten(1).std(1), torch.ones(64), atol=1e-5)

    def low(x: torch.Tensor) -> float:
        spectrum = torch.fft.fft2(x, norm="ortho").abs().square()
        return spectrum[..., :2, :2].mean().item()

    assert low(one) > 1.5 * low(eps)
    assert torch.equal(one, multires(eps, 6, 0.5, seeded("multires")))
    plain = multires(eps, 0, 0.5, seeded("multires"))
    assert torch.allclose(plain, eps / eps.flatten(1).std(1).view(-1, 1, 1, 1))


def test_offset_shifts_whole_channels() -> None:
    eps = normal(256, 4, 8, 8)
    moved = offset(eps, 0.5, seeded("offset")) - eps
    assert (moved.flatten(2).std(2) < 1e-5).all()
    assert moved[:, :, 0, 0].std().item() == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize("objective", [EPS, FLOW], ids=lambda o: o.name)
def test_perturbation_moves_the_input_only(objective) -> None:
    d = noised(objective, normal(64, 4, 8, 8), torch.full((64,), 0.5), normal(64, 4, 8, 8, seed=1))
    moved = perturbed(objective, d, 0.2, seeded("perturb"))
    _, sigma = objective.path(d.t)
    assert (moved.x - d.x).std().item() == pytest.approx(0.2 * sigma[0].item(), rel=0.05)
    assert moved.eps is d.eps


def test_strong_perturbation_of_a_tiny_batch_keeps_the_data_contract() -> None:
    """By chance the added noise looks like 2 % of the data; it is known and taken away."""
    x0, eps, t = normal(1, 4, 4, 4), normal(1, 4, 4, 4, seed=1), torch.full((1,), 0.5)
    for seed in range(20):
        moved = perturbed(FLOW, noised(FLOW, x0, t, eps), 0.9, seeded("perturb", seed))
        check(moved, FLOW)
    with pytest.raises(Refused, match="noised latents hold"):
        check(replace(moved, x0=1.05 * x0), FLOW)
