"""Reading ahead changes when a batch is read, never which."""

import threading

import pytest

from recast.data.ahead import Ahead


def test_the_same_results_whatever_order_they_are_asked_in() -> None:
    read: list[tuple[int, str]] = []

    def square(number: int) -> int:
        read.append((number, threading.current_thread().name))
        return number * number

    with Ahead(square) as ahead:
        asked = [3, 4, 5, 8, 11, 14, 2]
        assert [ahead(n) for n in asked] == [n * n for n in asked]
        here = [n for n, name in read if not name.startswith("batches")]
    # the first, two at a new distance, and one that lay behind: all others were read ahead
    assert here == [3, 8, 2]


def test_an_error_is_raised_where_its_result_is_asked_for() -> None:
    def two(number: int) -> int:
        if number == 2:
            raise ValueError("two")
        return number

    with Ahead(two) as ahead:
        assert ahead(1) == 1
        with pytest.raises(ValueError, match="two"):
            ahead(2)
    with Ahead(two) as ahead:
        ahead(1)  # what nobody asks for disturbs nobody
