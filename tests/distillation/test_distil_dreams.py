"""Dreams of any number: the draws of all of them in memory, few of them held."""

from __future__ import annotations

import gc
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recast.commit import lock
from recast.distillation.dreams import AT_ONCE, Dreams, Kept, dreamt
from recast.dream import Plan, read_shards
from recast.errors import Stopped
from recast.model import Model, open_model
from recast.text.encode import Condition, cat
from recast.train import seeded

PICTURES = AT_ONCE + 8
PLAN = Plan(
    (*(f"a lamp and {k} kites" for k in range(PICTURES - 2)), "a boat " * 90, ""),
    PICTURES, steps=2, last=True,
)  # fmt: skip
DROPOUT = 0.2


@pytest.fixture
def model(home: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    monkeypatch.setattr("recast.dream.POSITIONS", 64)  # four pictures a shard
    return open_model(home / "sd15.safetensors")


@pytest.fixture
def pairs(home: Path, model: Model) -> Path:
    """A finished dream."""
    folder = home / "dreamt"
    finished(dreamt(model, folder, PLAN, DROPOUT, lambda: 0))
    return folder


def finished(work: Generator[Any, None, Dreams]) -> Dreams:
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


def in_memory(model: Model, folder: Path) -> tuple[Tensor, Tensor, Condition]:
    """All latents, each one's row, and all conditions, as one would hold them."""
    shards = read_shards(folder, PLAN, model.checkpoint.sha256())
    prompts = [text for shard in shards for text in shard.prompts]
    known = [*dict.fromkeys(text for text in prompts if text), ""]
    groups = [known[k : k + AT_ONCE] for k in range(0, len(known), AT_ONCE)]
    with torch.no_grad():
        conditions = cat([model.condition(group) for group in groups])
    x0 = []
    for shard in shards:
        u, u_null = shard.u[-1].float(), shard.u_null[-1].float()
        x0.append(shard.x[-1].float() - shard.t[-1] * (u_null + 3.0 * (u - u_null)))
    return torch.cat(x0), torch.tensor([known.index(text) for text in prompts]), conditions


def test_draws_are_those_of_all_in_memory_and_few_are_held(model: Model, pairs: Path) -> None:
    x0, row, conditions = in_memory(model, pairs)
    dreams = finished(dreamt(model, pairs, PLAN, DROPOUT, lambda: 0))
    latents, texts = dreams.latents.kept, dreams.texts.kept
    latents.most, texts.most = 2 * x0[:4].nbytes, 5 * conditions.context[0].nbytes
    before = living()
    for number in range(12):
        found, condition = dreams.batch(number, 6, 3)
        generator = seeded(3, "pictures", number)
        index = torch.randint(PICTURES, (6,), generator=generator)
        gone = torch.rand(6, generator=generator) < DROPOUT
        wanted = torch.where(gone, len(conditions) - 1, row[index])
        assert torch.equal(found, x0[index])
        assert torch.equal(condition.context, conditions.context[wanted])
        assert 0 < latents.nbytes <= latents.most
        assert 0 < texts.nbytes <= texts.most
        del found, condition
    assert latents.nbytes == sum(each.nbytes for each in latents.held.values())
    assert living() - before <= latents.most + texts.most + 4096


def living() -> int:
    """Bytes of all tensors there are, each storage once."""
    gc.collect()
    found = {}
    for each in gc.get_objects():
        if type(each) is Tensor:
            storage = each.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def test_what_is_there_is_not_encoded_again_and_what_is_damaged_is(
    model: Model, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = finished(dreamt(model, pairs, PLAN, DROPOUT, lambda: 0)).batch(0, 8, 0)[1]
    asked: list[int] = []
    real = Model.condition

    def counted(self: Model, prompts: Any, **more: Any) -> Condition:
        asked.append(len(prompts))
        return real(self, prompts, **more)

    monkeypatch.setattr(Model, "condition", counted)
    again = finished(dreamt(model, pairs, PLAN, DROPOUT, lambda: 0))
    assert torch.equal(again.batch(0, 8, 0)[1].context, whole.context)
    assert asked == []
    for entry in (pairs / "texts").glob("*/*.safetensors"):
        entry.write_bytes(entry.read_bytes()[:-1])
    again = finished(dreamt(model, pairs, PLAN, DROPOUT, lambda: 0))
    assert torch.equal(again.batch(0, 8, 0)[1].context, whole.context)
    assert asked
    assert set(asked) <= {AT_ONCE, PICTURES - AT_ONCE}


def test_encoding_stops_between_groups_and_goes_on(model: Model, tmp_path: Path) -> None:
    with pytest.raises(Stopped, match="while encoding prompts"):
        finished(dreamt(model, tmp_path, PLAN, DROPOUT, lambda: 15))
    assert len(list((tmp_path / "texts").glob("*/*.safetensors"))) == AT_ONCE
    assert not list(tmp_path.glob("pairs-*"))


def test_only_the_first_process_dreams(
    model: Model, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "1")
    with lock(pairs):
        finished(dreamt(model, pairs, PLAN, DROPOUT, lambda: 0))


def test_the_last_value_is_kept_even_if_it_is_too_large() -> None:
    kept = Kept(lambda number: [number] * 9, len, most=20)
    for number in (0, 1, 0, 2, 0):
        kept(number)
    assert list(kept.held) == [2, 0]
    kept.most = 5
    kept(7)
    assert list(kept.held) == [7]
    assert kept.nbytes == 9
