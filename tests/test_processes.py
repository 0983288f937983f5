"""Who is who, and what a launcher may not ask for; tests/convert runs two for real."""

import sys

import pytest

from recast import processes
from recast.errors import Refused
from recast.train import team


def place(monkeypatch: pytest.MonkeyPatch, rank: int, count: int) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(count))


def test_alone_without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert processes.first()
    assert not processes.several()
    assert team() is None
    assert processes.speaks(2)
    processes.linger()
    processes.leave()
    assert not processes.sharing()
    processes.join()


def test_every_batch_belongs_to_one(monkeypatch: pytest.MonkeyPatch) -> None:
    owners = []
    for rank in range(3):
        place(monkeypatch, rank, 3)
        owners.append([number for number in range(9) if processes.mine(number)])
    assert sorted(number for owner in owners for number in owner) == list(range(9))
    assert owners[1] == [1, 4, 7]


@pytest.mark.parametrize("name", ["MEGATRON_LM", "DEEPSPEED"])
def test_foreign_ways_to_share_out_weights_are_refused(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    place(monkeypatch, 1, 2)
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(Refused, match="--multi_gpu"):
        processes.join()


def test_gradients_are_put_together_by_dtype_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    team_module = sys.modules["recast.train.team"]
    monkeypatch.setattr(team_module, "BUCKET", 10)
    held = [torch.zeros(n, dtype=d) for n, d in ((6, torch.float32), (3, torch.bfloat16))]
    held += [torch.zeros(n) for n in (4, 1, 20)]
    sizes = [[p.numel() for p in bucket] for bucket in team_module.buckets(held)]
    assert sizes == [[6, 4], [1], [20], [3]]
