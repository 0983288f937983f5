"""Block Krylov iteration: optimal, orthonormal, reproducible, and honest where it cannot go on."""

import math

import pytest
import torch
from torch import Tensor

from recast import subspace
from recast.layout.spectra import draw
from recast.subspace import Factored, Formed, Operator, leading, random_block

SIDE, RANK = 256, 16


def wide(spectrum: str = "half") -> Tensor:
    return draw((SIDE, 400), spectrum, torch.Generator().manual_seed(0))


def search(operator: Operator, rank: int, tolerance: float, most: int = SIDE) -> Tensor | None:
    return leading(operator, random_block(SIDE, rank, torch.empty(0)), rank, tolerance, most)


def lost(matrix: Tensor, basis: Tensor) -> float:
    """Energy that the projection on a basis misses of what the best of its rank holds."""
    best = torch.linalg.svdvals(matrix.double())[: basis.shape[1]].square().sum()
    return float(1 - (basis.double().T @ matrix.double()).square().sum() / best)


@pytest.mark.parametrize("spectrum", ["half", "steep", "flat"])
@pytest.mark.parametrize("tolerance", [3e-3, 4e-7])
def test_the_tolerance_bounds_what_is_lost(spectrum: str, tolerance: float) -> None:
    matrix = wide(spectrum)
    basis = search(Formed(matrix @ matrix.T), RANK, tolerance)
    assert basis is not None
    assert lost(matrix, basis) <= 2 * tolerance + 2e-7
    torch.testing.assert_close(basis.T @ basis, torch.eye(RANK), atol=1e-5, rtol=0)


@pytest.mark.parametrize("spectrum", ["half", "steep", "flat"])
def test_bf16_costs_energy_and_not_orthonormality(spectrum: str) -> None:
    matrix = wide(spectrum)
    basis = search(Factored(matrix, SIDE), RANK, 3e-3)
    assert basis is not None
    assert lost(matrix, basis) <= 5e-3
    torch.testing.assert_close(basis.T @ basis, torch.eye(RANK), atol=1e-5, rtol=0)


def test_vectors_fall_and_belong_to_the_largest_values() -> None:
    values = torch.cat([torch.tensor([9.0, 4.0, 1.0]), torch.linspace(0.1, 0, SIDE - 3)])
    turn = torch.linalg.qr(torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(1)))[0]
    basis = search(Formed(turn * values @ turn.T), 3, 1e-6)
    assert basis is not None
    torch.testing.assert_close((turn[:, :3].T @ basis).abs(), torch.eye(3), atol=1e-4, rtol=0)


def test_a_spectrum_of_ten_decades_keeps_the_basis_orthonormal() -> None:
    # One round of Gram-Schmidt loses it here, which is why there are two.
    values = 10.0 ** -torch.linspace(0, 10, SIDE)
    turn = torch.linalg.qr(torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(1)))[0]
    matrix = turn * values.sqrt()
    basis = search(Formed(matrix @ matrix.T), RANK, 1e-6)
    assert basis is not None
    assert lost(matrix, basis) <= 2e-6
    torch.testing.assert_close(basis.T @ basis, torch.eye(RANK), atol=1e-5, rtol=0)


def test_the_same_numbers_every_time() -> None:
    matrix = wide()
    first, second = (search(Factored(matrix.clone(), SIDE), RANK, 3e-3) for _ in range(2))
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    "square",
    [
        torch.zeros(SIDE, SIDE),
        torch.ones(SIDE, SIDE),  # one direction: the first product has nothing else
        torch.full((SIDE, SIDE), math.nan),
    ],
    ids=["zero", "one direction", "NaN"],
)
def test_what_has_no_directions_to_find_is_given_up(square: Tensor) -> None:
    start = random_block(SIDE, RANK, square) @ square
    assert leading(Formed(square), start, RANK, 1e-3, SIDE) is None


def test_a_basis_too_small_to_converge_is_given_up() -> None:
    matrix = wide("flat")
    assert search(Formed(matrix @ matrix.T), RANK, 4e-7, most=4 * RANK) is None


def test_a_basis_that_lost_its_orthonormality_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(new: Tensor, basis: Tensor) -> Tensor:
        return new / new.norm(dim=1, keepdim=True)

    matrix = wide()
    monkeypatch.setattr(subspace, "_orthonormal", careless)
    assert search(Formed(matrix @ matrix.T), RANK, 1.0) is None
