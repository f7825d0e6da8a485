"""A rank joins a trainer's group while it serves, with every kind of listener at the given address."""

from __future__ import annotations

import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from msgspec.structs import replace

from safelight.protocol.operations import Join, Leave, Perform
from safelight.protocol.reports import Performed
from safelight.worker.operations.group_orders import GroupOrders
from safelight.worker.parallel.ranks import ALONE
from safelight.worker.weights.transport import groups
from safelight.worker.weights.transport.groups import ProcessGroups


@pytest.fixture
def silent() -> Iterator[int]:
    """The port of a listener that accepts connections and stays silent."""
    accepted = []

    def accept() -> None:
        while True:
            try:
                accepted.append(listener.accept()[0])
            except OSError:
                return

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield int(listener.getsockname()[1])
        listener.shutdown(socket.SHUT_RDWR)
    for connection in accepted:
        connection.close()


def order(port: int, timeout_s: float, number: int = 1) -> Perform:
    join = Join(
        address="127.0.0.1", port=port, rank_offset=1, world_size=2, group="g", backend="gloo", timeout_s=timeout_s
    )
    return Perform(number=number, step="prepare", is_primary=True, operation=join)


def until(find: Callable[[], object]) -> None:
    late = time.monotonic() + 60
    while not find():
        assert time.monotonic() < late, "it did not happen"
        time.sleep(0.01)


def joining_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("join-")]


def settled(orders: GroupOrders) -> Performed:
    """The answer to the join, which a leader's loop finds in one of its steps."""
    found: list[Performed] = []
    until(lambda: found.extend(filter(None, map(orders.settle, orders.due()))) or found)
    return found[0]


def test_a_join_of_someone_who_says_nothing_ends_at_its_limit_and_leaves_no_thread_behind(silent: int) -> None:
    orders = GroupOrders(ProcessGroups(0, torch.device("cpu")), ALONE)
    assert orders.perform(order(silent, timeout_s=0.5)) is None
    until(joining_threads)
    answer = settled(orders)
    assert answer.error is not None
    assert (answer.error.status, "could not be joined within 0.5 s" in answer.error.message) == (503, True)
    until(lambda: not joining_threads())


def test_a_group_can_be_left_while_it_is_joined_and_its_name_is_free_again(silent: int) -> None:
    orders = GroupOrders(ProcessGroups(0, torch.device("cpu")), ALONE)
    orders.perform(order(silent, timeout_s=600))
    again = orders.perform(order(silent, timeout_s=600, number=2))
    assert again is not None
    assert again.error is not None
    assert again.error.status == 409
    left = orders.perform(Perform(number=3, step="prepare", is_primary=True, operation=Leave("g")))
    assert left is not None
    assert left.report.left
    until(lambda: not joining_threads())
    assert orders.due() == []
    assert orders.perform(order(silent, timeout_s=600, number=4)) is None
    until(joining_threads)
    orders.perform(Perform(number=5, step="prepare", is_primary=True, operation=Leave("g")))
    until(lambda: not joining_threads())


def test_a_release_of_one_join_leaves_another_of_the_same_name_alone(silent: int) -> None:
    orders = GroupOrders(ProcessGroups(0, torch.device("cpu")), ALONE)
    orders.perform(order(silent, timeout_s=600))
    refused = order(silent, timeout_s=600, number=2)
    orders.perform(refused)
    orders.perform(Perform(number=2, step="release", is_primary=True, operation=refused.operation))
    assert joining_threads()
    first = order(silent, timeout_s=600)
    orders.perform(Perform(number=1, step="release", is_primary=True, operation=first.operation))
    until(lambda: not joining_threads())


def test_groups_are_bounded_in_number(silent: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "MAX_GROUPS", 1)
    orders = GroupOrders(ProcessGroups(0, torch.device("cpu")), ALONE)
    orders.perform(order(silent, timeout_s=600))
    second = order(silent, timeout_s=600, number=2)
    assert isinstance(second.operation, Join)
    refused = orders.perform(replace(second, operation=replace(second.operation, group="other")))
    assert refused is not None
    assert refused.error is not None
    assert (refused.error.status, "destroy one" in refused.error.message) == (409, True)
    orders.perform(Perform(number=3, step="prepare", is_primary=True, operation=Leave("g")))
    until(lambda: not joining_threads())


def _join_and_end(port: int) -> None:
    GroupOrders(ProcessGroups(0, torch.device("cpu")), ALONE).perform(order(port, timeout_s=600))
    until(lambda: os.listdir("/proc/self/task")[1:])


def test_a_join_that_goes_on_does_not_keep_its_process_from_ending(silent: int) -> None:
    process = multiprocessing.get_context("fork").Process(target=_join_and_end, args=(silent,))
    process.start()
    process.join(60)
    alive = process.is_alive()
    process.kill()
    assert not alive


def test_all_groups_are_left_where_no_name_is_given(silent: int) -> None:
    orders = GroupOrders(ProcessGroups(0, torch.device("cpu")), ALONE)
    orders.perform(order(silent, timeout_s=600))
    until(joining_threads)
    left = orders.perform(Perform(number=2, step="prepare", is_primary=True, operation=Leave(None)))
    assert left is not None
    assert left.report.left
    until(lambda: not joining_threads())
    again = orders.perform(Perform(number=3, step="prepare", is_primary=True, operation=Leave(None)))
    assert again is not None
    assert not again.report.left
