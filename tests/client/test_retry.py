"""When a client asks again, against a server that really answers so."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from safelight.client import (
    Client,
    Conflict,
    ConnectionLost,
    DeadlinePassed,
    Internal,
    QueueFull,
    Retries,
    SafelightError,
    Unavailable,
    Unreachable,
)
from safelight.client.errors import retry_after

from .played_server import Draw, PlayedServer, Reply, error_reply, event, event_reply, generation, json_reply

DONE = json_reply(generation())


@pytest.mark.parametrize(("status", "code"), [(429, "queue_full"), (503, "unavailable")])
def test_a_full_or_warming_server_is_asked_again_after_the_time_it_named(draw: Draw, status: int, code: str) -> None:
    with PlayedServer(error_reply(status, code, retry_after="1"), DONE) as server:
        started = time.monotonic()
        assert draw(server, "a").id == "r1"
        assert time.monotonic() - started >= 1.0
        assert len(server.requests) == 2
        assert server.requests[0].body == server.requests[1].body


def test_a_stream_is_asked_for_again_as_long_as_it_has_not_begun(draw: Draw) -> None:
    stream = event_reply(event("result", generation()))
    with PlayedServer(error_reply(429, "queue_full", retry_after="0"), stream) as server:
        assert len(draw(server, "a", stream=True)) == 1
        assert len(server.requests) == 2


def test_an_error_within_a_stream_is_final(draw: Draw) -> None:
    error = {"error": {"code": "queue_full", "message": "No.", "field": None, "request_id": "r1", "retry_after_s": 0}}
    with PlayedServer(event_reply(event("error", error))) as server:
        with pytest.raises(QueueFull):
            draw(server, "a", stream=True)
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (error_reply(429, "queue_full"), QueueFull),
        (error_reply(503, "unavailable"), Unavailable),
        (error_reply(500, "internal", retry_after="0"), Internal),
        (error_reply(409, "conflict", retry_after="0"), Conflict),
        (error_reply(504, "deadline_passed", retry_after="0"), DeadlinePassed),
        (Reply(200, (b'{"id":',), cut=True), ConnectionLost),
    ],
    ids=["429 alone", "503 alone", "500", "409", "504", "cut off"],
)
def test_after_any_other_answer_nothing_is_sent_twice(draw: Draw, reply: Reply, error: type[SafelightError]) -> None:
    with PlayedServer(reply, DONE) as server:
        with pytest.raises(error):
            draw(server, "a")
        assert len(server.requests) == 1


def test_the_attempts_are_counted(draw: Draw) -> None:
    with PlayedServer(error_reply(429, "queue_full", retry_after="0")) as server:
        with pytest.raises(QueueFull):
            draw(server, "a")
        assert len(server.requests) == 1 + 3


def test_a_time_beyond_the_budget_is_not_waited_for(draw: Draw) -> None:
    with PlayedServer(error_reply(503, "unavailable", retry_after="3600"), DONE) as server:
        started = time.monotonic()
        with pytest.raises(Unavailable):
            draw(server, "a")
        assert time.monotonic() - started < 5


def test_no_retries_means_none() -> None:
    with (
        PlayedServer(error_reply(429, "queue_full", retry_after="0")) as server,
        Client(server.url, retries=Retries(0)) as client,
    ):
        with pytest.raises(QueueFull):
            client.generate("a")
        assert len(server.requests) == 1


def test_a_refused_connection_is_tried_again_only_if_asked() -> None:
    with PlayedServer(DONE) as server:
        url = server.url
    with Client(url) as client, pytest.raises(Unreachable, match="safelight serve"):
        client.generate("a")
    patient = Retries(count=3, refused=True, refused_pause_s=0.1, jitter=0.0)
    started = time.monotonic()
    with Client(url, retries=patient) as client, pytest.raises(Unreachable):
        client.generate("a")
    assert time.monotonic() - started >= 0.3


def test_a_pause_is_never_shorter_than_named_and_not_the_same_for_all() -> None:
    policy = Retries(count=1, jitter=0.25)
    pauses = {policy.begin().pause_after(QueueFull("No.", retry_after_s=8.0)) for _ in range(20)}
    assert len(pauses) > 1
    assert all(8.0 <= pause <= 10.0 for pause in pauses)


def test_retry_after_may_be_seconds_or_a_date() -> None:
    in_a_minute = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    assert retry_after("7") == 7.0
    assert retry_after(in_a_minute) == pytest.approx(60, abs=5)
    assert retry_after("Sun, 06 Nov 1994 08:49:37 GMT") == 0.0
    assert [retry_after(value) for value in (None, "soon", "nan", "inf", "-")] == [None] * 5
