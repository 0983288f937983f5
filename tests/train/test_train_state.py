"""Interrupted anywhere and resumed, a run ends with the bytes of the run that was not."""

import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from tests.train.tiny_run import Tiny, stream
from torch import Tensor

from recast.errors import Diverged, Refused
from recast.objective import FLOW
from recast.optim import OPTIMIZERS, averaged, build
from recast.train import (
    SCHEDULES,
    Ema,
    append,
    criterion,
    from_data,
    latest,
    load,
    log_length,
    open_log,
    save,
    train,
)
from recast.train.tree import flatten, unflatten

torch.set_num_threads(1)
LOSS = criterion(from_data(FLOW), FLOW)
STEPS = 8
SMALL = {  # what these do with large tensors or late, they shall do in a tiny run
    "prodigyplus": {"prodigy_steps": 5},  # state shrinks on the way
    "adamw8bit": {"min_8bit_size": 256},
}


class Run:
    """One process's worth of training: everything made anew, as after a restart."""

    def __init__(self, name: str, dtype: torch.dtype, with_ema: bool, total: int = STEPS) -> None:
        self.total = total
        self.net = Tiny(dtype)
        self.named = dict(self.net.named_parameters())
        lr = {} if "d0" in OPTIMIZERS[name].arguments else {"lr": 1e-2}
        self.optimizer = build(name, self.named.values(), **lr, **SMALL.get(name, {}))
        self.ema = Ema(list(self.named.values()), 0.9) if with_ema else None
        self.done = 0

    def go(self, steps: int) -> None:
        run = train(
            self.net.student, stream(self.done), LOSS, self.optimizer, ema=self.ema, done=self.done,
            schedule=SCHEDULES["linear"](self.total + 1),
        )  # fmt: skip
        for step in islice(run, steps):
            self.done = step.step

    def save(self, root: Path, **options: object) -> Path:
        return save(
            root, step=self.done, parameters=self.named, optimizer=self.optimizer, ema=self.ema,
            **options,
        )  # fmt: skip

    def load(self, path: Path, **options: object) -> dict:
        self.done, extra = load(
            path, parameters=self.named, optimizer=self.optimizer, ema=self.ema, **options
        )
        return extra

    def tensors(self) -> list[Tensor]:
        means = self.ema.tensors if self.ema else []
        return [p.detach().clone() for p in self.named.values()] + [m.clone() for m in means]


def straight(name: str, dtype: torch.dtype, with_ema: bool) -> list[Tensor]:
    torch.manual_seed(7)
    run = Run(name, dtype, with_ema)
    run.go(STEPS)
    return run.tensors()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resumed_is_uninterrupted(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    wanted = straight(name, dtype, with_ema=True)
    everywhere = name in ("adamw", "dadaptlion", "prodigyplus")
    for stop in range(1, STEPS) if everywhere else (3,):
        torch.manual_seed(7)
        first = Run(name, dtype, with_ema=True)
        first.go(stop)
        path = first.save(tmp_path / str(stop))
        torch.manual_seed(99)  # another process has another random state
        second = Run(name, dtype, with_ema=True)
        second.load(path)
        second.go(STEPS - stop)
        for mine, theirs in zip(second.tensors(), wanted, strict=True):
            assert torch.equal(mine, theirs), f"stopped at {stop}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_previews_and_saves_on_the_way_change_nothing(dtype: torch.dtype, tmp_path: Path) -> None:
    wanted = straight("prodigyplus", dtype, with_ema=False)
    torch.manual_seed(7)
    run = Run("prodigyplus", dtype, with_ema=False)
    for _ in range(STEPS):
        run.go(1)
        run.save(tmp_path)
        with averaged(run.optimizer):
            pass
    assert all(torch.equal(a, b) for a, b in zip(run.tensors(), wanted, strict=True))


def test_optimizer_state_keeps_its_dtypes(tmp_path: Path) -> None:
    one, two = (Run("prodigyplus", torch.float32, False) for _ in range(2))
    one.go(2)
    two.load(one.save(tmp_path))
    kinds = []
    for p, q in zip(one.named.values(), two.named.values(), strict=True):
        a, b = one.optimizer.state[p], two.optimizer.state[q]
        assert list(a) == list(b)
        for key, value in a.items():
            if isinstance(value, Tensor):
                kinds.append(value.dtype)
                assert b[key].dtype == value.dtype
            else:
                assert b[key] == value
                assert type(b[key]) is type(value)
    assert {torch.bfloat16, torch.float32} <= set(kinds)


def test_a_damaged_state_is_passed_over_and_named(tmp_path: Path) -> None:
    assert latest(tmp_path / "none") is None
    run = Run("adamw", torch.float32, True)
    for _ in range(3):
        run.go(1)
        run.save(tmp_path)
    assert sorted(p.name for p in tmp_path.glob("step*")) == ["step00000002", "step00000003"]
    newest = tmp_path / "step00000003" / "optimizer.safetensors"
    raw = bytearray(newest.read_bytes())
    raw[-1] ^= 1
    newest.write_bytes(raw)
    found = latest(tmp_path)
    assert found is not None
    assert (found.step, found.damaged) == (2, (tmp_path / "step00000003",))
    again = Run("adamw", torch.float32, True)
    again.load(found.path)
    again.go(1)
    again.save(tmp_path)  # replaces the damaged one
    assert latest(tmp_path).step == 3
    assert all(torch.equal(a, b) for a, b in zip(again.tensors(), run.tensors(), strict=True))


def test_a_state_of_another_run_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    one = Run("adamw", torch.float32, False)
    one.go(1)
    same = {"seed": 1, "shape": (1, 2)}
    path = one.save(tmp_path, identity=same, extra={"log": 5, "u": torch.ones(2)})
    two = Run("adamw", torch.float32, False)
    before = two.tensors()
    with pytest.raises(Refused, match="seed was 1 and is 2"):
        two.load(path, identity={"seed": 2, "shape": (1, 2)})
    with pytest.raises(Refused, match="without an average"):
        Run("adamw", torch.float32, True).load(path, identity=same)
    with pytest.raises(Refused, match=r"differ from this run's, first one\.bias"):
        Run("adamw", torch.bfloat16, False).load(path, identity=same)
    assert all(torch.equal(a, b) for a, b in zip(two.tensors(), before, strict=True))
    extra = two.load(path, identity=same)
    assert extra["log"] == 5
    assert torch.equal(extra["u"], torch.ones(2))


def test_numbers_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    run = Run("adamw", torch.float32, False)
    with torch.no_grad():
        run.net.one.bias[0] = torch.nan
    with pytest.raises(Diverged, match=r"step 0: one\.bias"):
        run.save(tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(Refused, match="keep 2"):
        run.save(tmp_path, keep=1)


def test_the_log_is_cut_to_what_the_state_knew(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with open_log(path) as log:
        append(log, {"step": 1, "loss": 0.5})
        length = log_length(log)
        append(log, {"step": 2, "loss": float("nan"), "bins": [float("inf")]})
        log.write(b'{"step": 3, "lo')
    with open_log(path, length) as log:
        append(log, {"step": 2, "loss": float("nan")})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": None}]


def test_nested_values_come_back_as_they_were() -> None:
    value = {
        "state": {0: {"m": torch.ones(2), "dims": (1, 0), "none": None}},
        "groups": [{"betas": (0.9, 0.99), "growth": float("inf"), "dtype": torch.bfloat16}],
        "flag": True, "name": "x", "big": 2**70,
    }  # fmt: skip
    tensors: dict[str, Tensor] = {}
    tree = json.loads(json.dumps(flatten(value, tensors), allow_nan=False))
    back = unflatten(tree, tensors)
    assert torch.equal(back["state"][0].pop("m"), value["state"][0].pop("m"))
    assert back == value
    assert isinstance(back["state"][0]["dims"], tuple)
    with pytest.raises(TypeError, match=r"o\.f holds a builtin"):
        flatten({"f": print}, {})
