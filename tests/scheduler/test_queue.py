"""The order in which requests run and expire."""

import pytest

from safelight.scheduler.queue import Queue, by_deadline, by_turn
from safelight.scheduler.request import Request
from safelight.tests.scheduler.stage import generate


def request(number: int, *, priority: int = 0, deadline: float = 1.0) -> Request:
    return Request(generate(f"r{number}", priority=priority), number, 0.0, deadline, nbytes=0)


def drain(queue: Queue) -> list[int]:
    numbers = []
    while first := queue.first:
        numbers.append(first.number)
        queue.remove(first)
    return numbers


def test_higher_priority_runs_first_and_equals_run_in_order_of_arrival() -> None:
    queue = Queue(by_turn)
    for number, priority in enumerate([0, 5, 0, 5, -1, 5]):
        queue.add(request(number, priority=priority))
    assert drain(queue) == [1, 3, 5, 0, 2, 4]


def test_the_position_is_the_number_of_requests_ahead_not_the_number_of_arrivals() -> None:
    queue = Queue(by_turn)
    positions = [queue.add(request(number, priority=priority)) for number, priority in enumerate([0, 0, 9, 1])]
    assert positions == [0, 1, 0, 1]


def test_the_first_to_expire_comes_first_whatever_its_priority() -> None:
    queue = Queue(by_deadline)
    for number, deadline in enumerate([3.0, 1.0, float("inf"), 2.0, 1.0]):
        queue.add(request(number, deadline=deadline, priority=number))
    assert drain(queue) == [1, 4, 3, 0, 2]


def test_removal_takes_the_request_itself_out_of_many_that_look_alike() -> None:
    queue = Queue(by_turn)
    requests = [request(number) for number in range(5)]
    for each in requests:
        queue.add(each)
    queue.remove(requests[2])
    assert drain(queue) == [0, 1, 3, 4]


def test_a_request_that_is_not_there_cannot_be_removed_in_place_of_another() -> None:
    queue = Queue(by_turn)
    queue.add(request(0))
    queue.add(request(2))
    with pytest.raises(AssertionError):
        queue.remove(request(0))
