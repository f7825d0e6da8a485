"""Results that no client reads do not fill the machine's memory."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import httpx
import msgspec
import pytest
from starlette.types import Message

from safelight.protocol.codec import Buffer
from safelight.protocol.config import Config
from safelight.protocol.errors import ClientGone, QueueFull
from safelight.protocol.generation import Generate, Output, Preview, Progress, Result
from safelight.protocol.messages import FromScheduler
from safelight.server import unread
from safelight.server.generation_response import Reply
from safelight.server.subscription import PREVIEWS_KEPT, Subscription
from safelight.server.unread import KEPT_S, PATIENCE_S, Taker, Unread, UnreadReply

from .played_scheduler import finished
from .stage import Stage, stage
from .test_connections import address_of

pytestmark = pytest.mark.anyio


def made(directory: Path, name: str, age_s: float, size: int = 1000) -> Path:
    file = directory / f"rollout-{name}.safetensors"
    file.write_bytes(bytes(size))
    then = time.time() - age_s
    os.utime(file, (then, then))
    return file


def test_files_that_nobody_fetches_make_room_the_oldest_first_and_fresh_ones_stay(tmp_path: Path) -> None:
    oldest, old = made(tmp_path, "b", PATIENCE_S + 20), made(tmp_path, "a", PATIENCE_S + 10)
    fresh = made(tmp_path, "c", 0)
    Unread(tmp_path, 2000).make_room()
    assert (oldest.exists(), old.exists(), fresh.exists()) == (False, True, True)


def test_where_fresh_files_fill_the_room_a_new_rollout_is_refused_and_its_own_files_are_gone(tmp_path: Path) -> None:
    fresh, mine = made(tmp_path, "a", 0, size=3000), made(tmp_path, "b", 0)
    with pytest.raises(QueueFull, match="max-unread-mb"):
        Unread(tmp_path, 2000).make_room([mine])
    assert (fresh.exists(), mine.exists()) == (True, False)


def test_what_was_not_fetched_for_long_goes_also_where_there_is_room(tmp_path: Path) -> None:
    abandoned, other = made(tmp_path, "a", KEPT_S + 1), tmp_path / "upload-1"
    other.mkdir()
    Unread(tmp_path, 1 << 30).sweep()
    assert (abandoned.exists(), other.exists()) == (False, True)


@pytest.mark.parametrize("what", ["reads", "goes away"])
async def test_a_reply_that_is_not_taken_loses_its_files_and_its_bytes_count_no_longer(
    what: str, tmp_path: Path
) -> None:
    file, bound = made(tmp_path, "a", 0), Unread(tmp_path, 2000)
    reply = UnreadReply([bytes(1500)], bound, "application/msgpack", files=[file])

    async def receive() -> Message:
        await asyncio.sleep(0.02 if what == "goes away" else 3600)
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body" and message["body"]:
            with pytest.raises(QueueFull):
                bound.make_room()
            await asyncio.sleep(0 if what == "reads" else 3600)

    await reply({"type": "http", "asgi": {"spec_version": "2.3"}}, receive, send)
    assert file.exists() == (what == "reads")
    bound.make_room()


LARGE = 12_000_000
ASK = b'{"prompt": "a"%s}'


def large(generate: Generate) -> list[FromScheduler]:
    return finished(generate, os.urandom(LARGE))


async def ask_and_read_nothing(played: Stage, more: bytes, accept: bytes) -> asyncio.StreamWriter:
    _, writer = await asyncio.open_connection(*address_of(played), limit=1024)
    body = ASK % more
    head = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nAccept: %s\r\nContent-Length: %d\r\n\r\n"
    writer.write(head % (accept, len(body)) + body)
    return writer


async def asked_until(status: int, played: Stage) -> httpx.Response:
    for _ in range(3000):
        reply = await played.client.post("/generate", content=ASK % b"")
        if reply.status_code == status:
            return reply
        await asyncio.sleep(0.02)
    raise AssertionError(reply.text[:1000])


@pytest.mark.parametrize(
    ("accept", "more"),
    [(b"image/png", b""), (b"*/*", b""), (b"*/*", b', "stream": true')],
    ids=["file", "JSON", "stream"],
)
async def test_pictures_that_nobody_reads_are_bounded_like_rollouts(accept: bytes, more: bytes) -> None:
    async with stage(Config(max_unread_mb=20), answer=large) as played:
        writers = []
        for number in range(2):  # each below the bound, and both above it
            writers.append(await ask_and_read_nothing(played, more, accept))
            await played.until(lambda number=number: len(played.scheduler.generates()) > number)
        assert "--max-unread-mb" in (await asked_until(429, played)).text
        for writer in writers:
            writer.close()
        reply = await asked_until(200, played)
        assert len(reply.json()["outputs"][0]["b64"]) >= LARGE


@pytest.mark.parametrize("size", [1500, 100_000])
async def test_a_client_that_takes_a_byte_now_and_then_keeps_a_reply_only_for_so_long(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unread, "TAKEN_S", 0.05)
    monkeypatch.setattr(unread, "SLOWEST_BYTES_S", 10_000_000)
    bound = Unread(tmp_path, 2000)

    async def send(message: Message) -> None:
        await asyncio.sleep(0.02 if message["type"] == "http.response.start" else 3600)

    async def receive() -> Message:
        await asyncio.sleep(3600)
        raise AssertionError

    with pytest.raises(ClientGone):
        await UnreadReply([bytes(size)], bound, "image/png")({"type": "http", "asgi": {}}, receive, send)
    bound.make_room()


async def test_a_reply_that_is_sent_at_once_needs_no_more_than_a_connection_holds_before_it_pauses() -> None:
    async with stage() as played:
        _, writer = await asyncio.open_connection(*address_of(played))
        pauses_from = writer.transport.get_write_buffer_limits()[1]
        writer.close()
    assert pauses_from >= unread.AT_ONCE


def test_a_missing_directory_holds_no_files(tmp_path: Path) -> None:
    Unread(tmp_path / "gone", 2000).make_room()


def behind_a_preview(generate: Generate) -> list[FromScheduler]:
    """A result that comes while the client has yet to take what came before it."""
    *begun, result = finished(generate, bytes(LARGE))
    return [*begun, Preview(generate.request_id, 0, 1, 2, Buffer(bytes(LARGE // 4 * 3))), result]


async def test_results_that_wait_behind_an_event_that_nobody_reads_are_counted_and_bounded() -> None:
    async with stage(Config(max_unread_mb=20), answer=behind_a_preview) as played:
        writer = await ask_and_read_nothing(played, b', "stream": true, "preview_every": 1', b"*/*")
        assert "--max-unread-mb" in (await asked_until(429, played)).text  # the preview alone is below the bound
        writer.close()
        await asked_until(200, played)


def test_a_result_for_which_there_is_no_room_is_not_kept_for_a_client_that_does_not_read(tmp_path: Path) -> None:
    bound, generate = Unread(tmp_path, 2000), Generate(request_id="a", samples=[])
    first, second = Subscription("a"), Subscription("b")
    with bound.counting(first), bound.counting(second):
        for events in (first, second):
            result = finished(generate)[-1]
            assert isinstance(result, Result)
            events.deliver(msgspec.structs.replace(result, outputs=[Output(Buffer(bytes(3000)), "png", 1, 8, 8)]))
        assert (first.unread_bytes, second.unread_bytes, second.ended) == (3000, 0, True)
        with pytest.raises(QueueFull):
            bound.make_room()
    bound.make_room()


def test_a_file_that_cannot_be_removed_stops_no_reply(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A link's loop delivers the replies of all requests, and an error of the file system would end it."""
    old = tmp_path / "rollout-a.safetensors"
    old.mkdir()
    os.utime(old, (0, 0))
    events, result = Subscription("a"), finished(Generate(request_id="a", samples=[]))[-1]
    assert isinstance(result, Result)
    with Unread(tmp_path, 2000).counting(events):
        events.deliver(result)
    assert events.ended
    assert old.name in caplog.text


async def test_a_reply_is_counted_also_while_a_thread_encodes_it(tmp_path: Path) -> None:
    bound, generate = Unread(tmp_path, 2000), Generate(request_id="a", samples=[])
    result = finished(generate)[-1]
    assert isinstance(result, Result)
    result = msgspec.structs.replace(result, outputs=[Output(Buffer(bytes(1_000_000)), "png", 1, 8, 8)])
    encoding = asyncio.create_task(Reply("a", "model", generate, result, 1.0).as_json(bound))
    await asyncio.sleep(0)
    with pytest.raises(QueueFull):
        bound.make_room()
    await encoding
    bound.make_room()


async def test_a_stream_s_events_together_have_the_time_of_one_reply(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unread, "TAKEN_S", 0.1)

    async def send(taker: Taker) -> None:
        for _ in range(1000):
            async with taker.sending(10):
                await asyncio.sleep(0.01)

    with Unread(tmp_path, 2000).counting(Subscription("a")) as taker, pytest.raises(ClientGone):
        await send(taker)


async def test_previews_that_nobody_reads_are_few() -> None:
    subscription = Subscription("a")
    for step in range(10):
        subscription.deliver(Preview("a", 0, step, 10, Buffer(b"jpeg")))
        subscription.deliver(Progress("a", 0, step, 10))
    subscription.deliver(finished(Generate(request_id="a", samples=[]))[-1])  # type: ignore[arg-type]
    read = []
    while not isinstance(event := await subscription.next(), Result):
        read.append(event)
    assert [event.step for event in read if isinstance(event, Preview)] == list(range(PREVIEWS_KEPT))
    subscription.deliver(Preview("a", 0, 10, 10, Buffer(b"jpeg")))
    assert isinstance(await subscription.next(), Preview)
