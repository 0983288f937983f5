"""A mask says what each place of a sample counts, whatever the distance."""

from dataclasses import replace

import pytest
import torch

from recast.objective import FLOW
from recast.train import criterion, from_data, noised
from recast.train.loss import DISTANCES


@pytest.mark.parametrize("name", sorted(DISTANCES))
def test_errors_outside_the_mask_count_nothing(name: str) -> None:
    gen = torch.Generator().manual_seed(0)
    x0, eps, error = (torch.randn(2, 4, 8, 8, generator=gen) for _ in range(3))
    mask = torch.zeros(2, 1, 8, 8)
    mask[..., :3] = 1
    draw = replace(noised(FLOW, x0, torch.tensor([0.3, 0.6]), eps), mask=mask)
    loss = criterion(from_data(FLOW), FLOW, DISTANCES[name])
    target = FLOW.target(x0, eps, draw.t)

    def off(where: torch.Tensor) -> torch.Tensor:
        return loss(lambda d: target + error * where, draw).weighted

    torch.testing.assert_close(off(torch.ones(())), off(mask))
    assert (off(mask) > 1e-3).all()
    assert (off(1 - mask) < 1e-6).all()


def test_a_squared_error_counts_as_much_as_its_mask() -> None:
    x0, eps = torch.randn(2, 1, 4, 8, 8).unbind()
    draw = noised(FLOW, x0, torch.tensor([0.5]), eps)
    loss = criterion(from_data(FLOW), FLOW)
    half = replace(draw, mask=torch.full((1, 1, 8, 8), 0.25))
    wrong = FLOW.target(x0, eps, draw.t) + 1
    assert loss(lambda d: wrong, draw).distance.item() == pytest.approx(1)
    assert loss(lambda d: wrong, half).distance.item() == pytest.approx(0.25)
