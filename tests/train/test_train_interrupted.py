"""A run that is interrupted again and again, and a disk that fills up while its state is saved."""

import errno
import random
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from tests.faults import Faults
from tests.train.test_train_state import Run

from recast.errors import NoRoom
from recast.train import append, latest, open_log

torch.set_num_threads(1)
SIX = ("adamw", "adamw8bit", "adafactor", "dadaptlion", "prodigyplus", "saveus")
STEPS = 24


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", SIX)
def test_ten_interruptions_leave_no_trace(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Every other time the last state is lost, too, so that steps are taken again."""
    torch.manual_seed(7)
    whole = Run(name, dtype, True, STEPS)
    whole.go(STEPS)

    moments = random.Random(f"{name} {dtype}")
    stops = sorted(moments.sample(range(1, STEPS), 10))
    torch.manual_seed(7)
    run = Run(name, dtype, True, STEPS)
    run.save(tmp_path)
    for count, stop in enumerate(stops):
        run.go(max(0, stop - run.done))
        if count % 2 == 0:
            run.save(tmp_path)
        torch.manual_seed(count)  # another process has another random state
        run = Run(name, dtype, True, STEPS)
        found = latest(tmp_path)
        assert found is not None
        run.load(found.path)
    run.go(STEPS - run.done)
    for mine, theirs in zip(run.tensors(), whole.tensors(), strict=True):
        assert torch.equal(mine, theirs), stops


def test_a_full_disk_at_any_moment_of_a_save_leaves_the_state_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run("saveus", torch.float32, True)
    run.go(1)
    run.save(tmp_path)
    run.go(1)
    before: list[int] = []
    names, failing = {"step00000001", "step00000002"}, 0
    while True:
        failing += 1
        full = Faults(failing, errno.ENOSPC)
        with monkeypatch.context() as patch:
            patch.setattr("recast.commit.os", full)
            patch.setattr("recast.disk.os", full)
            with suppress(NoRoom):  # what else comes out is a bug
                run.save(tmp_path)
        found = latest(tmp_path)
        assert found is not None
        assert not found.damaged
        assert {p.name for p in tmp_path.iterdir()} <= names
        if full.count < failing:  # nothing failed
            break
        before.append(found.step)
    assert sorted(before) == before
    assert before.count(1) > 10
    assert before.count(2) < 5  # syncing the folder that it lies in already
    assert found.step == 2
    again = Run("saveus", torch.float32, True)
    again.load(latest(tmp_path).path)
    assert all(torch.equal(a, b) for a, b in zip(again.tensors(), run.tensors(), strict=True))


def test_a_full_disk_under_the_log_is_said_in_a_sentence(tmp_path: Path) -> None:
    class Full:
        name = "log.jsonl"

        def write(self, line: bytes) -> None:
            raise OSError(errno.ENOSPC, "no space")

    with pytest.raises(NoRoom, match=r"log\.jsonl could not be written, its disk is full"):
        append(Full(), {"step": 1})
    with open_log(tmp_path / "log.jsonl") as log:
        append(log, {"step": 1})
