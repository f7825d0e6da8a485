"""The wait of new requests for the clients that were just answered."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from safelight.protocol.generation import Cancel, Generate, Sample
from safelight.protocol.messages import ToWorker
from safelight.worker.rank.gathering import PATIENCE, Gathering

TOOK_S = 1.6


class Arrivals:
    """Messages that come after the given seconds; waiting takes the clock there."""

    def __init__(self, *after_s: float) -> None:
        self.now = 0.0
        self.messages: list[ToWorker] = []
        """The messages of each arrival; if empty, one request."""
        self._due = [*after_s]

    def receive(self, wait_s: float) -> list[ToWorker]:
        if not self._due or self._due[0] > self.now + wait_s:
            self.now += max(0.0, wait_s)
            return []
        self.now = self._due.pop(0)
        return self.messages or [request(f"at {self.now}")]


def request(name: str) -> Generate:
    return Generate(request_id=name, samples=[Sample(prompt="a cat", seed=0)], num_inference_steps=1)


def gathered(gathering: Gathering, arrivals: Arrivals, *, drawn: int, together: int = 16) -> Sequence[ToWorker]:
    return gathering.gather([request("first")], arrivals.receive, drawn=drawn, took_s=TOOK_S, together=together)


def test_all_clients_that_were_answered_start_together() -> None:
    arrivals = Arrivals(0.01, 0.02, 0.03, 0.04)
    gathering = Gathering(0.5, lambda: arrivals.now)
    assert len(gathered(gathering, arrivals, drawn=4)) == 4
    assert arrivals.now == 0.03, "the fourth was the last one to wait for"


@pytest.mark.parametrize(("drawn", "together"), [(0, 16), (1, 16), (4, 1)], ids=["new", "alone", "never together"])
def test_a_request_that_has_nobody_to_wait_for_starts_at_once(drawn: int, together: int) -> None:
    arrivals = Arrivals(0.01)
    gathering = Gathering(0.5, lambda: arrivals.now)
    assert len(gathered(gathering, arrivals, drawn=drawn, together=together)) == 1
    assert arrivals.now == 0


def test_the_wait_for_clients_that_do_not_come_back_is_short_and_not_repeated_each_time() -> None:
    arrivals = Arrivals()
    gathering = Gathering(0.5, lambda: arrivals.now)
    waited = []
    for start in range(1, 21):
        before = arrivals.now
        gathered(gathering, arrivals, drawn=4 * start)
        waited.append(arrivals.now - before)
    assert waited[0] == TOOK_S * PATIENCE
    assert sum(map(bool, waited)) == 4, "starts 1, 3, 7 and 15"


def test_the_wait_for_clients_that_come_slowly_has_an_end() -> None:
    arrivals = Arrivals(*(0.09 * number for number in range(1, 20)))
    gathering = Gathering(0.5, lambda: arrivals.now)
    assert len(gathered(gathering, arrivals, drawn=20)) == 6
    assert arrivals.now == pytest.approx(0.5)


def test_a_client_that_came_while_others_ran_is_not_waited_for_again() -> None:
    arrivals = Arrivals(0.01)
    gathering = Gathering(0.5, lambda: arrivals.now)
    gathering.arrived([request("early")], drawn=1)
    gathering.arrived([], drawn=3)
    assert len(gathered(gathering, arrivals, drawn=3)) == 2
    assert arrivals.now == 0.01


def test_clients_that_have_stayed_away_for_long_are_not_waited_for() -> None:
    arrivals = Arrivals()
    gathering = Gathering(0.5, lambda: arrivals.now)
    gathering.arrived([], drawn=4)
    arrivals.now = 2 * TOOK_S
    gathered(gathering, arrivals, drawn=4)
    assert arrivals.now == 2 * TOOK_S


def test_any_other_message_ends_the_wait() -> None:
    arrivals = Arrivals(0.01)
    gathering = Gathering(0.5, lambda: arrivals.now)
    arrivals.messages = [request("second"), Cancel("first")]
    assert len(gathered(gathering, arrivals, drawn=4)) == 3
    assert arrivals.now == 0.01


def test_zero_seconds_switch_it_off() -> None:
    arrivals = Arrivals(0.0, 0.0, 0.0)
    assert len(gathered(Gathering(0.0, lambda: arrivals.now), arrivals, drawn=4)) == 1
