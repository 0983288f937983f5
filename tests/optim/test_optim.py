"""Every row builds and steps, names are helped along, and previews leave training untouched."""

import pytest
import torch
from torch import Tensor, nn

from recast.errors import Refused
from recast.optim import OPTIMIZERS, averaged, build

torch.set_num_threads(1)


def weights(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    gen = torch.Generator().manual_seed(0)
    shapes = [(40, 36), (40,)]
    return [nn.Parameter(torch.randn(s, generator=gen).to(dtype)) for s in shapes]


def descend(optimizer: torch.optim.Optimizer, steps: int) -> list[Tensor]:
    params = [p for g in optimizer.param_groups for p in g["params"]]
    for _ in range(steps):
        optimizer.zero_grad()
        sum(((p.float() - 1) ** 2).mean() for p in params).backward()
        optimizer.step()
    return [p.detach().clone() for p in params]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_row_descends(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    params = weights()
    start = sum(((p - 1) ** 2).mean().item() for p in params)
    descend(build(name, params), 120)
    assert sum(((p - 1) ** 2).mean().item() for p in params) < start
    assert capsys.readouterr().out == ""


def test_one_call_steps_all_tensors_to_where_single_calls_take_them() -> None:
    at_once, singly = build("adamw", weights()), build("adamw", weights(), fused=False)
    assert at_once.param_groups[0]["fused"]
    assert not singly.param_groups[0]["fused"]
    for one, other in zip(descend(at_once, 20), descend(singly, 20), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)
    assert not build("adamw", weights(torch.bfloat16)).param_groups[0]["fused"]


def test_published_settings_are_the_defaults() -> None:
    lion = build("dadaptlion", weights()).param_groups[0]
    assert (lion["betas"], lion["d"], lion["lr"]) == ((0.9, 0.99), 1e-5, 1.0)
    assert lion["weight_decay"] == 0
    plus = build("prodigyplus", weights()).param_groups[0]
    assert (plus["betas"], plus["prodigy_steps"], plus["schedulefree_c"]) == ((0.8, 0.8), 100, 10)


def test_names_arguments_and_rates_are_checked() -> None:
    with pytest.raises(Refused, match="'dadaptlion'"):
        build("DAdapt_Lyon", weights())
    with pytest.raises(Refused, match="nearest is 'weight_decay'"):
        build("dadaptlion", weights(), weigth_decay=0.1)
    with pytest.raises(Refused, match="lr is 0"):
        build("adamw", weights(), lr=0.0)
    with pytest.raises(Refused, match="cannot be imported"):
        build("torch.optim.NoSuch", weights())
    with pytest.raises(Refused, match="not a torch Optimizer"):
        build("torch.nn.Linear", weights())


def test_a_dotted_path_and_groups() -> None:
    a, b = weights()
    optimizer = build("torch.optim.SGD", [{"params": [a], "lr": 0.5}, {"params": [b]}], lr=0.1)
    assert [g["lr"] for g in optimizer.param_groups] == [0.5, 0.1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_previews_leave_training_untouched(dtype: torch.dtype) -> None:
    straight, looked = (build("prodigyplus", weights(dtype), d0=1e-2) for _ in range(2))
    torch.manual_seed(0)
    end = descend(straight, 30)
    torch.manual_seed(0)
    for _ in range(6):
        training = descend(looked, 5)
        with averaged(looked):
            shown = [p.detach().clone() for g in looked.param_groups for p in g["params"]]
    assert not torch.equal(shown[0], training[0])
    for mine, theirs in zip(end, training, strict=True):
        assert torch.equal(mine, theirs)


def test_averaged_does_nothing_to_plain_optimizers() -> None:
    optimizer = build("adamw", weights())
    with averaged(optimizer):
        descend(optimizer, 1)
