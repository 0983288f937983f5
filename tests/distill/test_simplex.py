"""Simplices and the staircase: their identities."""

import pytest
import torch

from recast.distill import simplex
from recast.distill.staircase import staircase
from recast.errors import Refused


def cayley_menger(points: torch.Tensor) -> torch.Tensor:
    """The determinant of the bordered matrix of squared distances."""
    matrix = torch.ones(6, 6, dtype=points.dtype)
    matrix[0, 0] = 0
    matrix[1:, 1:] = (points[:, None] - points[None]).square().sum(-1)
    return torch.linalg.det(matrix)


def test_the_volume_is_cayley_and_menger_s() -> None:
    points = torch.randn(5, 12, dtype=torch.float64)
    expected = -cayley_menger(points) / 9216
    torch.testing.assert_close(simplex.volume(points) ** 2, expected, rtol=1e-10, atol=0)


def test_a_regular_simplex_has_the_known_volume_and_quality_one() -> None:
    points = simplex.regular((3,), 7, generator=torch.Generator().manual_seed(0)).double()
    edges = (points[:, :, None] - points[:, None]).norm(dim=-1)
    rows, columns = torch.triu_indices(5, 5, 1)
    torch.testing.assert_close(
        edges[:, rows, columns], torch.ones(3, 10).double(), rtol=1e-5, atol=0
    )
    assert simplex.volume(points).tolist() == pytest.approx([0.0232924] * 3, rel=2e-5)
    assert simplex.quality(7e-3 * points).tolist() == pytest.approx([1.0] * 3, abs=2e-5)


def test_quality_falls_to_zero_as_a_simplex_goes_flat_and_has_a_gradient_there() -> None:
    points = torch.randn(5, 6)
    flat = points.clone()
    flat[:, 3:] = 0
    assert 0.01 < simplex.quality(points) < 1
    assert simplex.quality(flat) < 1e-2
    same = torch.zeros(5, 6, requires_grad=True)
    (simplex.loss(torch.stack([flat, points])) + simplex.loss(same)).backward()
    assert same.grad is not None
    assert same.grad.isfinite().all()


def test_the_loss_counts_only_what_is_below_its_bound() -> None:
    good = simplex.regular((), 6)
    assert simplex.loss(good) == 0
    assert simplex.loss(torch.zeros(5, 6)) == pytest.approx(0.25, abs=1e-3)


def test_prototypes_lie_on_the_sphere_and_are_no_degenerate_simplices() -> None:
    points = simplex.prototypes((40,), 128, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(points.norm(dim=-1), torch.ones(40, 5))
    assert simplex.quality(points).min() > 0.9
    with pytest.raises(Refused, match="4 dimensions"):
        simplex.regular((), 3)


def at(x: float, alpha: float, depth: int = 30) -> float:
    wide = torch.tensor(x, dtype=torch.float64)
    return staircase(wide, torch.tensor(alpha, dtype=torch.float64), depth).item()


def test_alpha_zero_is_the_cantor_function() -> None:
    assert at(1 / 4, 0.0) == pytest.approx(1 / 3, abs=1e-8)
    assert at(0.4, 0.0) == pytest.approx(0.5, abs=1e-12)
    assert at(2 / 9, 0.0) == pytest.approx(1 / 4, abs=1e-8)


def test_alpha_one_third_is_the_identity() -> None:
    x = torch.rand(200, dtype=torch.float64)
    third = torch.tensor(1 / 3, dtype=torch.float64)
    torch.testing.assert_close(staircase(x, third), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.05, 0.2, 1 / 3, 0.6, 0.8])
def test_known_values_symmetry_and_order(alpha: float) -> None:
    side = (1 - alpha) / 2
    assert at(0.0, alpha) == 0
    assert at(1.0, alpha) == pytest.approx(1, abs=1e-12)
    assert at(1 / 3, alpha, 12) == pytest.approx(side, abs=1e-12)
    assert at(1 / 4, alpha) == pytest.approx(side / (1 + side), abs=1e-9)
    x = torch.linspace(0, 1, 1009, dtype=torch.float64)
    y = staircase(x, torch.tensor(alpha, dtype=torch.float64))
    torch.testing.assert_close(y + y.flip(0), torch.ones_like(y), rtol=0, atol=1e-9)
    assert (y.diff() >= 0).all()


def test_its_gradients_in_x_and_alpha_are_right() -> None:
    x = torch.tensor([0.1, 0.29, 0.51, 0.83], dtype=torch.float64, requires_grad=True)
    alpha = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: staircase(a, b, 4), (x, alpha))
