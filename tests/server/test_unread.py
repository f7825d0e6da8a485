"""Rollouts that nobody takes do not fill the machine's memory."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest
from starlette.types import Message

from safelight.protocol.errors import QueueFull
from safelight.server.unread import KEPT_S, PATIENCE_S, Unread, UnreadReply

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
    reply = UnreadReply([bytes(1500)], bound, [file])

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
