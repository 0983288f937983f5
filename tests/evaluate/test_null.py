"""The distance between the two null conditions is one of velocities, whatever is predicted."""

import json
from pathlib import Path

import pytest
import torch
from tests import tiny
from tests.convert import command
from torch import Tensor

from recast.evaluate.null import Nulls, levels, null_distance
from recast.model import open_model
from recast.objective import EPS, FLOW, Net, V, express
from recast.text.encode import Condition

BOTH = Nulls(Condition(torch.ones(1, 2, 3)), Condition(torch.zeros(1, 2, 3)))
X0 = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def velocity(bound: Condition) -> Net:
    """Half as long and turned about where the condition is zero."""
    factor = 1.0 if bound.context.any() else -0.5
    return lambda x, t: factor * torch.ones_like(x)


def test_the_distance_is_relative_to_the_empty_prompt() -> None:
    found = list(levels(velocity, X0, BOTH, 4, 0))
    assert [level.distance for level in found] == pytest.approx([1.5] * 4)
    assert [(level.low, level.high) for level in found] == [(k / 4, k / 4 + 0.25) for k in range(4)]


def test_one_network_has_one_distance_in_every_objective() -> None:
    def eps_net(bound: Condition) -> Net:
        def answer(x: Tensor, t: Tensor) -> Tensor:
            return x * (0.5 + bound.context.mean()) + t.view(-1, 1, 1, 1)

        return answer

    def in_v(bound: Condition) -> Net:
        return express(express(eps_net(bound), EPS, V), V, FLOW)

    plain = list(levels(lambda c: express(eps_net(c), EPS, FLOW), X0.double(), BOTH, 5, 1))
    turned = list(levels(in_v, X0.double(), BOTH, 5, 1))
    for one, other in zip(plain, turned, strict=True):
        assert one.distance == pytest.approx(other.distance, rel=1e-5)
    assert len({round(level.distance, 3) for level in plain}) == 5


def test_inspect_measures_it_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny.checkpoint(
        tmp_path / "m.safetensors", "sd15", dtype="F16", vocabulary=49408,
        metadata={"recast.size": "64"},
    )  # fmt: skip
    command.run(["inspect", path, "--null", "--json"])
    found = json.loads(capsys.readouterr().out)["null"]
    assert [level["low"] for level in found] == [k / 10 for k in range(10)]
    model = open_model(path)
    prompts = ["a red kite over dunes", "an old lamp"]
    assert all(level.distance > 0 for level in null_distance(model, prompts))
    command.run(["inspect", path, "--json"])
    assert "null" not in json.loads(capsys.readouterr().out)
