"""Connections: strangers who hold as many as they can keep nobody from being answered."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator

import pytest

from safelight.protocol.config import Config
from safelight.protocol.generation import Generate, Queued
from safelight.protocol.messages import FromScheduler
from safelight.server import connections, http_server
from safelight.server.connections import Connection

from .stage import Stage, stage

pytestmark = pytest.mark.anyio

FEW = Config(max_connections=20)
SILENT = {
    "silent": b"",
    "within the headers": b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-A",
    "within the body": b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n{",
    "idle": b"GET /liveness HTTP/1.1\r\nHost: localhost\r\n\r\n",
}


@contextlib.asynccontextmanager
async def strangers(played: Stage, number: int, say: bytes) -> AsyncIterator[list[asyncio.StreamReader]]:
    async with contextlib.AsyncExitStack() as stack:
        readers = []
        for _ in range(number):
            reader, writer = await asyncio.open_connection(*address_of(played))
            stack.callback(writer.close)
            writer.write(say)
            readers.append(reader)
        yield readers


async def health(played: Stage) -> int:
    """On a connection of its own."""
    reply = await played.client.get("/health", headers={"Connection": "close"})
    return reply.status_code


@pytest.mark.parametrize("say", SILENT.values(), ids=SILENT.keys())
async def test_more_connections_than_there_may_be_leave_the_server_answering(
    say: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with stage(FEW) as played, strangers(played, 60, say) as readers:
        assert [await health(played) for _ in range(5)] == [200] * 5
        assert connections_of(played) <= 20
        if say != SILENT["idle"]:
            ended = [reader.at_eof() or reader.exception() is not None for reader in readers]
            assert ended == sorted(ended, reverse=True), "the ones that waited longest gave way"
    assert len([record for record in caplog.records if "connection" in record.getMessage()]) == 1


async def test_a_request_that_is_worked_on_never_gives_way() -> None:
    def queued(generate: Generate) -> list[FromScheduler]:
        return [Queued(generate.request_id, 0)]

    body = b'{"prompt": "a"}'
    say = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    async with stage(FEW, answer=queued) as played, strangers(played, 19, say) as readers:
        await played.until(lambda: len(played.scheduler.generates()) == 19, 60)
        async with strangers(played, 30, b""):
            assert await health(played) == 200
            assert not any(reader.at_eof() for reader in readers)
            assert played.scheduler.cancelled() == []


async def test_one_connection_too_many_is_refused_in_words_while_all_others_are_served() -> None:
    def queued(generate: Generate) -> list[FromScheduler]:
        return [Queued(generate.request_id, 0)]

    body = b'{"prompt": "a"}'
    say = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    async with stage(FEW, answer=queued) as played, strangers(played, 20, say):
        await played.until(lambda: len(played.scheduler.generates()) == 20, 60)
        async with strangers(played, 1, b"") as (reader,):
            answer = await reader.read()
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"Retry-After" in answer


async def test_headers_that_never_end_and_answers_that_nobody_reads_end_the_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connections, "HEADERS_S", 0.3)
    monkeypatch.setattr(connections, "UNREAD_S", 0.3)
    async with stage() as played:
        for say in (b"", SILENT["within the headers"]):
            async with strangers(played, 1, say) as (reader,):
                with contextlib.suppress(ConnectionError):
                    await asyncio.wait_for(reader.read(), 20)
        async with strangers(played, 1, SILENT["idle"] * 200_000):  # and reads none of the answers
            await played.until(lambda: connections_of(played) == 1, 60)
        assert await health(played) == 200


async def test_a_request_that_offers_http_2_keeps_its_body_and_its_connection() -> None:
    """curl --http2 and Java's client offer it with the first request of a connection."""
    offer, body = b"Connection: Upgrade\r\nUpgrade: h2c\r\n", b'{"prompt": "a"}'
    say = b"POST /generate HTTP/1.1\r\nHost: localhost\r\n%sContent-Length: %d\r\n\r\n%s" % (offer, len(body), body)
    async with stage() as played, strangers(played, 1, say + SILENT["idle"]) as (reader,):
        read = b""
        while read.count(b"HTTP/1.1 200 OK") < 2 and (more := await asyncio.wait_for(reader.read(1 << 16), 60)):
            read += more
    assert read.count(b"HTTP/1.1 200 OK") == 2


async def test_headers_do_not_grow_beyond_their_bound() -> None:
    async with stage() as played, strangers(played, 1, SILENT["within the headers"] + b"a" * 100_000) as (reader,):
        assert b" 400 " in await asyncio.wait_for(reader.readline(), 60)


async def test_a_body_of_tiny_chunks_is_parsed_little_by_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """256 KB of chunks with a byte each take 0.7 s to parse, in which nobody else would have a turn."""
    head = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    body = b'{"prompt": "a", "image": "' + b"A" * 400_000 + b'"}'
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body[:50_000]) + b"0\r\n\r\n"
    parsed: list[int] = []
    receive = Connection.data_received

    def data_received(connection: Connection, data: bytes) -> None:
        parsed.append(len(data))
        receive(connection, data)

    monkeypatch.setattr(Connection, "data_received", data_received)
    async with stage() as played:
        async with strangers(played, 1, head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks) as (reader,):
            assert b" 422 " in await reader.readline()
        assert sum(parsed) > 250_000
        assert max(parsed) <= 4096
        async with strangers(played, 1, head + b"Content-Length: %d\r\n\r\n" % len(body) + body) as (reader,):
            assert b" 400 " in await reader.readline()
        assert max(parsed) > 4096, "where the length is known, large reads are faster"


def address_of(played: Stage) -> tuple[str, int]:
    host, _, port = played.url.removeprefix("http://").partition(":")
    return host, int(port)


def connections_of(played: Stage) -> int:
    return len(played.http.server_state.connections)


@pytest.fixture
def few_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_a_lack_of_descriptors_is_logged_once_and_waited_out(
    few_descriptors: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(http_server, "_RETRY_S", 0.01)
    async with stage() as played:
        assert await health(played) == 200
        with socket.socket() as client:
            client.setblocking(False)
            _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (1, hard))
            await asyncio.get_running_loop().sock_connect(client, address_of(played))
            await asyncio.sleep(0.3)
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        assert await health(played) == 200
    assert len([record for record in caplog.records if "no connection can be accepted" in record.getMessage()]) == 1


def test_the_server_has_all_descriptors_that_the_system_allows() -> None:
    asked = "from safelight.server.descriptors import *; print(raise_descriptor_limit(), room_for_connections(4096))"
    command = f"ulimit -Sn 300; ulimit -Hn 1024; exec {sys.executable} -c '{asked}'"
    reported = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout
    assert reported.split() == ["1024", "768"]
