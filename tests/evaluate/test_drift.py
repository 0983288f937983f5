"""Drift and identity on networks whose errors are known in closed form."""

import math

import pytest
import torch
from torch import Tensor

from recast.errors import CheckFailed
from recast.evaluate.drift import drift
from recast.evaluate.identity import identity
from recast.objective import EPS, FLOW, Net, express

LATENTS = [torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(k)) for k in range(3)]


def constant(value: float) -> Net:
    return lambda x, t: torch.full_like(x, value)


def test_errors_of_constant_networks() -> None:
    found = drift(
        lambda c: constant(c + 0.5), lambda c: constant(c), FLOW, LATENTS, [0.0, 1.0, 2.0], bins=4
    )
    assert [level.against_original for level in found.levels] == pytest.approx([0.25] * 4)
    assert found.against_original == pytest.approx(0.25)
    assert (found.levels[0].low, found.levels[-1].high, found.objective) == (0, 1, "flow")
    assert found.ratio == pytest.approx(found.converted / found.original)


def test_a_network_equal_to_its_teacher_has_no_drift_and_the_floor_s_error() -> None:
    eps_net = constant(0.1)
    found = drift(
        lambda c: express(eps_net, EPS, FLOW),
        lambda c: express(eps_net, EPS, FLOW),
        FLOW,
        LATENTS,
        [None] * 3,
        source=EPS,
    )
    assert found.against_original == 0
    assert found.ratio == 1
    assert [level.covered for level in found.levels[:9]] == [1] * 9
    assert 0 <= found.levels[9].covered < 1


def test_means_leave_out_what_the_original_does_not_cover() -> None:
    def net(x: Tensor, t: Tensor) -> Tensor:
        return torch.where(t.view(-1, 1, 1, 1) > 0.9, 100.0, 0.0).expand_as(x)

    found = drift(
        lambda c: net, lambda c: constant(0), FLOW, LATENTS, [None] * 3, source=EPS, bins=100
    )
    assert found.levels[99].against_original == pytest.approx(1e4)
    assert found.levels[99].covered == 0
    assert found.against_original < found.levels[99].against_original * 0.05


def test_the_same_seed_gives_the_same_table() -> None:
    one, two, other = (
        drift(lambda c: constant(0.5), lambda c: constant(0), FLOW, LATENTS, [None] * 3, seed=s)
        for s in (1, 1, 2)
    )
    assert one == two != other


def test_an_answer_that_is_not_a_number_is_named() -> None:
    with pytest.raises(CheckFailed, match=r"between t = 0\.0 and 0\.1"):
        drift(lambda c: constant(math.nan), lambda c: constant(0), FLOW, LATENTS, [None] * 3)


def test_identity_is_proven_by_the_new_sampler_alone() -> None:
    base = [torch.zeros(3, 16, 16)] * 3
    near, far = [p + 0.02 for p in base], [p + 0.5 for p in base[:2]]
    proof = identity(base, near, far, judged=(0.9, 0.1))
    assert proof.proven
    assert (proof.psnr_new, proof.judged_old) == (pytest.approx(40), 0.1)
    assert not identity(base, far, near).proven
    assert not identity(base, near, near).proven
