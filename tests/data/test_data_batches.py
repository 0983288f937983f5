"""The order of examples: a pure function of seed and step, fair to every example and bucket."""

from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from recast.data.batches import (
    batch,
    batches_before,
    dropped,
    epoch,
    order,
    permutation,
    plan,
    uniform,
)
from recast.errors import Refused


def test_one_bucket_is_a_stream_of_whole_rounds() -> None:
    source = plan(["x"] * 10)
    seen = [i for step in range(25) for i in batch(source, step, 3, 4)]
    rounds = [seen[k : k + 10] for k in range(0, 100, 10)]
    assert all(sorted(r) == list(range(10)) for r in rounds)
    assert len({tuple(r) for r in rounds}) == 10


def test_same_step_same_batch_whatever_was_asked_before() -> None:
    source = plan(["a", "b", "a", "c", "b", "a", "a"])
    forward = [batch(source, s, 1, 2) for s in range(40)]
    order.cache_clear()
    permutation.cache_clear()
    assert [batch(source, s, 1, 2) for s in reversed(range(40))] == forward[::-1]
    assert forward != [batch(source, s, 2, 2) for s in range(40)]


def test_the_order_never_changes_between_versions() -> None:
    assert permutation(8, 0, "round", 0, 0).tolist() == [2, 0, 6, 4, 3, 1, 5, 7]
    assert uniform(0, "caption", 1, 2) == 0.9901920053503377


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(1, 9), st.integers(0, 5))
def test_buckets_in_proportion_and_nothing_left_out(counts: list, size: int, seed: int) -> None:
    buckets = [b for b, n in enumerate(counts) for _ in range(n)]
    source = plan(buckets)
    steps = batches_before(source, size, size)
    assert steps == sum(counts)
    seen: Counter[int] = Counter()
    for step in range(steps):
        chosen = batch(source, step, seed, size)
        assert len(chosen) == size
        assert len({buckets[i] for i in chosen}) == 1
        seen.update(chosen)
    assert set(seen.values()) == {size}


@given(
    st.lists(st.integers(1, 2000), min_size=1, max_size=9),
    st.integers(1, 64),
    st.integers(0, 10**6),
)
def test_epoch_is_the_inverse_of_batches_before(counts: list, size: int, step: int) -> None:
    source = plan([b for b, n in enumerate(counts) for _ in range(n)])
    number = epoch(source, step, size)
    assert batches_before(source, number, size) <= step < batches_before(source, number + 1, size)


def test_repeats_and_nothing_to_train_on() -> None:
    source = plan(["x", "x", "y"], [3, 1, 0])
    assert len(source) == 4
    assert Counter(i for s in range(4) for i in batch(source, s, 0, 1)) == {0: 3, 1: 1}
    with pytest.raises(Refused, match="no examples"):
        plan([])


def test_processes_share_a_batch_without_repeats() -> None:
    source = plan(["x"] * 64)
    whole = batch(source, 5, 7, 8)
    assert sorted(whole[0::2] + whole[1::2]) == sorted(whole)


def test_caption_dropout_rate() -> None:
    hits = sum(dropped(1, step, place, 0.1) for step in range(500) for place in range(8))
    assert 320 < hits < 480
    assert not any(dropped(1, s, 0, 0.0) for s in range(50))
    assert all(dropped(1, s, 0, 1.0) for s in range(50))
