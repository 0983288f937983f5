"""What the assessor reads, and the signals made of it."""

import math

import pytest
import torch
from tests.distill.small_assessor import TIMES, pooled, small

from recast.distill.assessor import bin_of
from recast.distill.signals import absolute, assess
from recast.errors import Refused


def test_bins_cover_the_path() -> None:
    t = torch.tensor([0.0, 0.0999, 0.1, 0.999, 1.0])
    assert bin_of(t, 10).tolist() == [0, 0, 1, 9, 9]


@pytest.mark.parametrize("prototypes", ["per_bin", "shared"])
@pytest.mark.parametrize("head", ["rose", "subcentre", "centroid"])
def test_pattern_logits_are_those_of_their_formula(head: str, prototypes: str) -> None:
    made = small(head, prototypes)
    k = torch.tensor([3, 7])
    z = torch.nn.functional.normalize(torch.randn(2, 16), dim=1)
    found = made.pattern_logits("mid", z, k)
    points = made.probe("mid").points
    for row in range(2):
        each = points[k[row]] if prototypes == "per_bin" else points
        for j in range(3):
            near = torch.stack([z[row] @ v for v in each[j]])
            role = torch.tensor([1, -0.75, 0.75, 0.75, -0.75])
            expected = {
                "rose": (role * near).sum() / 0.07,
                "subcentre": (near / 0.07).exp().sum().log(),
                "centroid": near.mean() / 0.07,
            }[head]
            torch.testing.assert_close(found[row, j], expected, rtol=1e-4, atol=1e-4)


def test_readings_have_their_shapes_and_start_unsure() -> None:
    read = small()(pooled())
    assert list(read) == ["down_0", "mid"]
    assert read["mid"].time_logits.shape == (32, 10)
    torch.testing.assert_close(read["mid"].z.norm(dim=1), torch.ones(32))
    assert small().probe("mid").alpha.item() == pytest.approx(1 / 3)


def test_drift_of_the_features_stays_visible() -> None:
    made = small()
    made.standardise(pooled(500))
    shifted = {name: 3 * each + 2 for name, each in pooled().items()}
    one, other = made(pooled())["mid"], made(shifted)["mid"]
    assert (one.time_logits - other.time_logits).abs().max() > 0.1


def test_a_channel_that_never_moves_is_not_blown_up() -> None:
    made = small()
    still = pooled(100)
    still["mid"][:, 0] = 5
    made.standardise(still)
    still["mid"][:, 0] += 1e-6
    assert made(still)["mid"].time_logits.isfinite().all()
    assert made.probe("mid").std[0] > 1e-4


def test_what_it_cannot_read_is_refused() -> None:
    with pytest.raises(Refused, match="features of block mid are missing"):
        small()({"down_0": torch.zeros(1, 6)})
    with pytest.raises(Refused, match="block mid has 5 pooled features"):
        small()({"down_0": torch.zeros(1, 6), "mid": torch.zeros(1, 5)})
    with pytest.raises(Refused, match="no block up_0"):
        small().probe("up_0")
    with pytest.raises(Refused, match="no pattern head 'lotus'"):
        small("lotus")
    with pytest.raises(Refused, match="per_bin or shared"):
        small(prototypes="own")


def test_a_student_equal_to_its_teacher_gives_no_signal() -> None:
    out = assess(small(), pooled(), TIMES, teacher_pooled=pooled())
    assert out.blocks == ("down_0", "mid")
    assert out.e_t.shape == (32, 2)
    assert not out.e_t.any()
    assert not out.e_p.any()
    assert (out.coh == 1).all()
    assert out.active.all()


def test_relative_signals_are_never_negative_and_see_a_difference() -> None:
    out = assess(small(), pooled(seed=1), TIMES, teacher_pooled=pooled())
    assert (out.e_t >= 0).all()
    assert (out.e_p >= 0).all()
    assert (out.coh <= 1).all()
    assert out.e_t.any(dim=0).all()


def test_literal_signals_are_the_published_ones() -> None:
    made = small()
    out = assess(made, pooled(), TIMES, form="literal")
    read = made(pooled())["mid"]
    k = bin_of(TIMES, 10)
    surprise = -read.time_logits.log_softmax(1)[torch.arange(32), k]
    share = made.pattern_logits("mid", read.z, k).softmax(1)
    entropy = -(share * share.log()).sum(1) / math.log(3)
    torch.testing.assert_close(out.e_t[:, 1], surprise)
    torch.testing.assert_close(out.e_p[:, 1], entropy)
    torch.testing.assert_close(out.coh, torch.full((32, 2), 1 / 3))


def test_a_constant_added_to_the_logits_changes_nothing() -> None:
    made, shifted = small(), small()
    with torch.no_grad():
        for name in shifted.blocks:
            shifted.probe(name).time_bias -= 20
    one, _, _ = absolute(made, pooled(), TIMES)
    other, _, _ = absolute(shifted, pooled(), TIMES)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_bins_that_are_not_active_give_no_signal() -> None:
    active = torch.arange(10) < 4
    out = assess(small(), pooled(), TIMES, form="literal", active_bins=active)
    assert out.active.tolist() == [k < 4 for k in bin_of(TIMES, 10).tolist()]
    assert not out.e_t[~out.active].any()
    assert (out.coh[~out.active] == 1).all()
    assert out.e_t[out.active].all()


def test_signals_carry_no_gradient() -> None:
    student = {name: each.requires_grad_() for name, each in pooled(seed=1).items()}
    out = assess(small(), student, TIMES, teacher_pooled=pooled())
    assert not out.e_t.requires_grad


def test_signals_that_cannot_be_had_are_refused() -> None:
    with pytest.raises(Refused, match="give both"):
        assess(small(), pooled(), TIMES)
    with pytest.raises(Refused, match="'absolute'"):
        assess(small(), pooled(), TIMES, form="absolute")
    with pytest.raises(Refused, match="mid"):
        assess(small(), {"down_0": torch.zeros(32, 6)}, TIMES, form="literal")
