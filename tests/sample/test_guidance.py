import torch
from tests.oracle import clusters, gaussian

from recast.objective import FLOW, V_ZSNR
from recast.sample import Met, guided, in_turn, plain

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
T = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)


def test_guidance_is_the_formula_in_one_call():
    calls = []
    both = in_turn(clusters().net(FLOW), gaussian().net(FLOW))

    def net(x, t):
        calls.append(len(x))
        return both(x, t)

    x0, eps = guided(net, FLOW, 3.0)(X, T)
    positive, negative = (each.denoiser(FLOW.path)(X, T) for each in (clusters(), gaussian()))
    torch.testing.assert_close(x0, negative[0] + 3 * (positive[0] - negative[0]))
    torch.testing.assert_close(eps, negative[1] + 3 * (positive[1] - negative[1]))
    assert calls == [6]


def test_the_guided_answer_still_composes_the_sample():
    net = in_turn(clusters().net(V_ZSNR), gaussian().net(V_ZSNR))
    x0, eps = guided(net, V_ZSNR, 7.0)(X, T)
    torch.testing.assert_close(V_ZSNR.noise(x0, eps, T), X)


def test_states_and_answers_are_kept_on_request():
    met: list[Met] = []
    plain(clusters().net(FLOW), FLOW, met=met)(X, T)
    guided(in_turn(clusters().net(FLOW), gaussian().net(FLOW)), FLOW, 2.0, met=met)(X, T)
    first, second = met
    assert first.negative is None
    assert second.negative is not None
    torch.testing.assert_close(first.positive, second.positive)
    torch.testing.assert_close(second.negative, gaussian().denoiser(FLOW.path)(X, T))
    assert torch.equal(second.x, X)
