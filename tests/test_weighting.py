import pytest
import torch

from recast.objective import EPS, FLOW, OBJECTIVES, V_ZSNR, X0, V
from recast.weighting import WEIGHTINGS

STEPS = torch.arange(1, 1001, dtype=torch.float64) / 1000


def weigh(name, objective, t=STEPS, **options):
    return WEIGHTINGS[name](**options)(*objective.path(t), objective)


def snr(objective):
    alpha, sigma = objective.path(STEPS)
    return (alpha / sigma) ** 2


def test_min_snr_is_the_published_one_for_each_prediction():
    s = snr(EPS)
    torch.testing.assert_close(weigh("min-snr", EPS), s.clamp(max=5) / s)
    torch.testing.assert_close(weigh("min-snr", V), s.clamp(max=5) / (s + 1))
    torch.testing.assert_close(weigh("min-snr", X0, gamma=1.0), s.clamp(max=1))
    flow = weigh("min-snr", FLOW, STEPS[:-1])
    t = STEPS[:-1]
    torch.testing.assert_close(flow, ((1 - t) / t).pow(2).clamp(0.00468, 5) * t**2)


def test_the_two_debiased_weights_differ_for_v_only():
    s = snr(EPS)
    usual = s < 900
    for name in ("debiased-kohya", "debiased-onetrainer"):
        torch.testing.assert_close(weigh(name, EPS)[usual], (s**-0.5)[usual])
        assert weigh(name, EPS).min() == pytest.approx(1000**-0.5, rel=1e-3)
    torch.testing.assert_close(weigh("debiased-kohya", V)[usual], (1 / (s + 1))[usual])
    torch.testing.assert_close(weigh("debiased-onetrainer", V)[usual], ((s + 1) ** -0.5)[usual])


def test_soft_min_snr_and_p2():
    s = snr(EPS)
    torch.testing.assert_close(weigh("soft-min-snr", X0, gamma=4.0), 4 * s / (4 + s))
    torch.testing.assert_close(weigh("p2", EPS, k=1.0, gamma=0.5), (1 + s) ** -0.5)


@pytest.mark.parametrize("name", WEIGHTINGS)
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_are_finite_per_sample_and_positive_at_pure_noise(name, objective, dtype):
    t = torch.linspace(0, 1, 101, dtype=dtype)
    weights = weigh(name, objective, t)
    assert weights.shape == (101,)
    assert weights.dtype == dtype
    assert torch.isfinite(weights).all()
    assert (weights >= 0).all()
    assert weights[-1] > 1e-4


def test_the_snr_is_the_rescaled_one():
    """At the step before last the rescaled path has far less signal, and weighs less."""
    assert weigh("min-snr", V_ZSNR, floor=0.0)[-2] < weigh("min-snr", V, floor=0.0)[-2] / 100
    assert weigh("min-snr", V_ZSNR)[-1] == pytest.approx(0.00468)
