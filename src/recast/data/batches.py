"""The order of the examples as a pure function of (seed, step): resuming needs no stored position.

Every bucket b is an endless stream of its n_b examples, reshuffled each round by a counter-based
generator (Philox, keyed by a hash of seed, bucket and round).  Epoch e holds floor((e+1) n_b /
size) - floor(e n_b / size) batches of bucket b, in shuffled order, so buckets appear in exact
proportion, all batches are full and no example is left out of a round.  The batches before epoch
e are a closed sum; a step finds its epoch by bisection.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import TYPE_CHECKING

from recast.errors import Refused

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Plan:
    """Indices of the examples by bucket, each as often as it is repeated."""

    groups: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return sum(map(len, self.groups))


def plan(buckets: Sequence[Hashable], repeats: Sequence[int] | None = None) -> Plan:
    """Group examples by bucket, in order of first appearance; `repeats` defaults to once each."""
    groups: dict[Hashable, list[int]] = {}
    for index, bucket in enumerate(buckets):
        groups.setdefault(bucket, []).extend([index] * (repeats[index] if repeats else 1))
    filled = tuple(tuple(group) for group in groups.values() if group)
    if not filled:
        raise Refused("There are no examples to train on.")
    return Plan(filled)


def batch(source: Plan, step: int, seed: int, size: int) -> tuple[int, ...]:
    """Return the example indices of batch `step` (from 0): `size` of them, all of one bucket.

    A process r of w takes `batch(source, step, seed, w * size)[r::w]`.
    """
    if size < 1 or step < 0:
        raise Refused(f"Batch size {size} and step {step}: at least 1 and 0 are needed.")
    number = epoch(source, step, size)
    place = step - batches_before(source, number, size)
    group, start = order(tuple(map(len, source.groups)), seed, number, size)[place]
    members = source.groups[group]
    return tuple(member(members, seed, group, start + j) for j in range(size))


def epoch(source: Plan, step: int, size: int) -> int:
    """Return the epoch that batch `step` belongs to."""
    low, high = 0, (step + 1 + len(source.groups)) * size // len(source) + 1
    while low < high:
        middle = (low + high) // 2
        if batches_before(source, middle + 1, size) > step:
            high = middle
        else:
            low = middle + 1
    return low


def batches_before(source: Plan, number: int, size: int) -> int:
    """Return how many batches the epochs before `number` hold."""
    return sum(number * len(group) // size for group in source.groups)


@lru_cache(maxsize=4)
def order(
    counts: tuple[int, ...], seed: int, number: int, size: int
) -> tuple[tuple[int, int], ...]:
    """Return an epoch's batches as (group, start in its stream), shuffled if there are buckets."""
    slots = [
        (group, k * size)
        for group, count in enumerate(counts)
        for k in range(number * count // size, (number + 1) * count // size)
    ]
    if len(counts) == 1:
        return tuple(slots)
    return tuple(slots[i] for i in permutation(len(slots), seed, "order", number))


def member(members: tuple[int, ...], seed: int, group: int, position: int) -> int:
    """Return the example at a position of a bucket's endless stream."""
    turn, place = divmod(position, len(members))
    return members[int(permutation(len(members), seed, "round", group, turn)[place])]


@lru_cache(maxsize=64)
def permutation(count: int, seed: int, *counters: Hashable) -> np.ndarray:
    """Return a permutation of range(count) that depends on nothing but its arguments.

    Raw Philox words are sorted, because numpy promises to keep bit streams, not
    `Generator.permutation`.
    """
    import numpy as np

    key = int.from_bytes(digest(seed, *counters)[:16], "little")
    return np.argsort(np.random.Philox(key=key).random_raw(count), kind="stable")


def uniform(seed: int, *counters: Hashable) -> float:
    """Return a number in [0, 1) that depends on nothing but its arguments (53 bits)."""
    return (int.from_bytes(digest(seed, *counters)[:8], "little") >> 11) * 2.0**-53


def dropped(seed: int, step: int, place: int, rate: float) -> bool:
    """True where the caption at `place` of batch `step` is left out, at the given rate."""
    return uniform(seed, "caption", step, place) < rate


def zeros(seed: int, step: int, place: int, share: float) -> bool:
    """True where a caption that is left out at `place` of batch `step` leaves zeros."""
    return uniform(seed, "zeros", step, place) < share


def digest(seed: int, *counters: Hashable) -> bytes:
    """Hash a seed and counters to 32 bytes."""
    return blake2b(repr((seed, *counters)).encode(), digest_size=32).digest()
