"""Jobs side by side: in order, in bounded room, errors passed on, torch's threads left alone."""

import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from recast.adapter.ahead import in_order


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 3])
def test_results_come_in_order_whatever_ends_first(count: int) -> None:
    def job(n: int) -> Callable[[], int]:
        return lambda: time.sleep(0.01 * (n % 3 == 0)) or n

    jobs = ((job(n), n % 2) for n in range(20))
    assert list(in_order(jobs, threads=count, room=5)) == list(range(20))
    assert torch.get_num_threads() == 2


def test_no_more_room_is_held_than_allowed() -> None:
    held, most = 0, 0
    guard = threading.Lock()

    def job(size: int) -> Callable[[], int]:
        def run() -> int:
            nonlocal held, most
            with guard:
                held += size
                most = max(most, held)
            return size

        return run

    sizes = [1, 4, 2, 9, 3, 3, 3, 1, 5, 6]
    for size in in_order(((job(size), size) for size in sizes), threads=3, room=6):
        held -= size
    assert most == 9  # the one that is larger than the room was alone


def test_a_job_without_size_waits_for_its_turn_in_the_caller() -> None:
    where: list[bool] = []
    main = threading.current_thread()
    job = (lambda: where.append(threading.current_thread() is main), 0)
    big = (lambda: where.append(threading.current_thread() is main), 1)
    list(in_order([job, big, job], threads=2, room=9))
    assert sorted(where) == [False, True, True]


def test_an_error_ends_the_rest() -> None:
    ran: list[int] = []

    def fail() -> None:
        raise ValueError("no")

    def job(n: int) -> Callable[[], None]:
        return lambda: time.sleep(0.01) or ran.append(n)

    jobs = [(fail, 1), *((job(n), 1) for n in range(50))]
    with pytest.raises(ValueError, match="no"):
        list(in_order(jobs, threads=2, room=1000))
    assert len(ran) < 50
    assert torch.get_num_threads() == 2
    work = in_order([(job(n), 1) for n in range(50)], threads=2, room=10)
    next(work)
    del work  # whoever takes them may stop
    assert len(ran) < 50
    assert torch.get_num_threads() == 2
