"""Trainers' groups: joined beside everything else, by all replicas or by none."""

from __future__ import annotations

import pytest

from safelight.protocol.errors import Unavailable
from safelight.protocol.generation import Cancel
from safelight.protocol.operations import Digests, Join, Leave, Perform
from safelight.protocol.reports import Operated, Performed, Report
from safelight.scheduler.groups import LATE_S, MOST_JOINING
from safelight.tests.scheduler.operating import Operating
from safelight.tests.scheduler.stage import generate


class Joining(Operating):
    """Replicas that do not answer an order to join, as those that wait for somebody who says nothing."""

    def _collect(self) -> None:
        super()._collect()
        for process in self.processes.values():
            for order in [order for order in process.orders if isinstance(order.operation, Join)]:
                process.orders.remove(order)

    def join(self, group: str = "g", timeout_s: float = 10.0) -> str:
        self.operate(
            f"join {group}",
            Join(address="a", port=1, rank_offset=1, world_size=3, group=group, backend="gloo", timeout_s=timeout_s),
        )
        return f"join {group}"

    def joins(self, step: str = "prepare") -> list[tuple[int, int]]:
        """Orders to join or to abandon a join: the replica's number, and the order's."""
        found = [(to, order) for to, order in self.ordered if isinstance(order.operation, Join) and order.step == step]
        return [(to, order.number) for to, order in found]

    def answer(self, replica: int, number: int, error: Unavailable | None = None) -> None:
        info = None if error is None else error.info()
        self.worker(replica, Performed(number, "prepare", Report(), info))


def test_nothing_waits_while_replicas_join_a_group_and_requests_and_operations_go_on() -> None:
    stage = Joining()
    asked = stage.join()
    stage.server(generate("drawn"))
    stage.operate("digests", Digests())
    stage.do_all()
    assert [name for name, _ in stage.started()] == ["drawn"]
    stage.done("digests")
    assert stage.unanswered(asked)
    for replica, number in stage.joins():
        stage.answer(replica, number)
    assert sorted(stage.done(asked).reports) == [0, 1]


def test_a_group_that_one_replica_cannot_join_is_left_by_all() -> None:
    stage = Joining()
    asked = stage.join()
    (_, number), _ = stage.joins()
    stage.answer(0, number)
    stage.answer(1, number, Unavailable("nobody came"))
    assert stage.refusal(asked) == "nobody came"
    assert stage.joins("release") == [(0, number), (1, number)]


def test_a_join_that_replicas_do_not_answer_ends_at_its_timeout() -> None:
    stage = Joining()
    asked = stage.join(timeout_s=10.0)
    stage.wait(10.0 + LATE_S)
    assert "in time" in stage.refusal(asked)
    assert len(stage.joins("release")) == 2


@pytest.mark.parametrize("named", ["g", None])
def test_a_group_can_be_destroyed_while_it_is_joined_also_during_a_begun_update(named: str | None) -> None:
    stage = Joining()
    asked = stage.join()
    stage.begin()
    stage.operate("destroy", Leave(named))
    stage.do_all()
    stage.done("destroy")
    assert "destroyed" in stage.refusal(asked)
    for replica, number in stage.joins():
        stage.answer(replica, number)  # which crossed the order to leave
    assert stage.sent(Operated, asked) == []


@pytest.mark.parametrize("why", ["the replica is lost", "the client is gone"])
def test_a_join_that_cannot_come_to_a_good_end_is_aborted_everywhere(why: str) -> None:
    stage = Joining()
    asked = stage.join()
    if why == "the client is gone":
        stage.server(Cancel(asked))
        assert stage.unanswered(asked)
        assert [to for to, _ in stage.joins("release")] == [0, 1]
    else:
        stage.kill(1)
        assert "lost" in stage.refusal(asked)
        assert [to for to, _ in stage.joins("release")] == [0]


def test_joins_are_bounded_in_number() -> None:
    stage = Joining()
    asked = [stage.join(str(number)) for number in range(MOST_JOINING + 1)]
    assert [stage.unanswered(name) for name in asked] == [True] * MOST_JOINING + [False]
    assert stage.error(asked[-1]) == "queue_full"


def test_a_group_that_nobody_has_is_left_already_without_a_replica() -> None:
    stage = Joining(ready=0)
    stage.operate("destroy", Leave("g"))
    assert stage.done("destroy").reports == {}
    assert not [order for _, order in stage.ordered if isinstance(order, Perform)]
