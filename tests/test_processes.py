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


class Store(dict):
    """What torch's store does, in this process; `gone` once its host is."""

    gone = False

    def check(self, names: list[str]) -> bool:
        if self.gone:
            raise RuntimeError("Connection reset by peer")
        return all(name in self for name in names)

    def get(self, name: str) -> bytes:  # type: ignore[override]
        return str(self[name]).encode()

    def set(self, name: str, value: str) -> None:
        self[name] = value

    def add(self, name: str, more: int) -> int:
        self.check([])
        self[name] = self.get_number(name) + more
        return self.get_number(name)

    def get_number(self, name: str) -> int:
        return int(dict.get(self, name, 0))


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    from torch import distributed

    found = Store()
    monkeypatch.setattr(processes, "_store", lambda: found)
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    return found


def test_who_ends_first_says_why(monkeypatch: pytest.MonkeyPatch, store: Store) -> None:
    place(monkeypatch, 1, 3)
    assert processes.speaks(2)
    assert store["code"] == "2"
    place(monkeypatch, 2, 3)
    assert not processes.speaks(1)
    assert store["code"] == "2"
    assert store["beat2"] == processes.OVER


def test_a_host_that_is_gone_is_told_of(monkeypatch: pytest.MonkeyPatch, store: Store) -> None:
    place(monkeypatch, 1, 2)
    store.gone = True
    assert processes.speaks(1)
    processes.leave()
    assert processes._silent({})
    with pytest.raises(processes.Left):
        processes.passed_on(lambda: 0)()


def test_silence_is_heard(monkeypatch: pytest.MonkeyPatch, store: Store) -> None:
    place(monkeypatch, 0, 3)
    now = 0.0
    monkeypatch.setattr(processes.time, "monotonic", lambda: now)
    heard: dict[int, tuple[bytes, float]] = {}
    store["beat1"], store["beat2"] = "0", "0"
    assert not processes._silent(heard)
    now, store["beat1"] = processes.SILENCE - 10, "1"
    assert not processes._silent(heard)
    now, store["beat2"] = processes.SILENCE + 1, processes.OVER  # ended in order
    assert not processes._silent(heard)
    now = 2 * processes.SILENCE - 11
    assert not processes._silent(heard)
    now = 2 * processes.SILENCE - 9
    assert processes._silent(heard)
