"""Slow senders do not keep others from sending."""

from __future__ import annotations

import asyncio

import pytest

from safelight.protocol.errors import QueueFull
from safelight.server import upload_turns
from safelight.server.upload_turns import AT_ONCE, SLOW_BYTES_S, Turn, Turns

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def _short_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload_turns, "WINDOW_S", 0.1)
    monkeypatch.setattr(upload_turns, "_LOOK_S", 0.02)


async def sender(turns: Turns, bytes_s: float, ended: list[float], started: asyncio.Event) -> None:
    """Sends at that pace until it is made to end."""
    try:
        async with turns.turn() as turn, asyncio.timeout(60) as timer:
            turn.timed_by(timer)
            started.set()
            while True:
                await asyncio.sleep(0.01)
                turn.received(int(bytes_s * 0.01))
    except TimeoutError:
        ended.append(bytes_s)


async def test_eight_slow_senders_do_not_block_a_ninth_and_the_slowest_makes_way() -> None:
    turns, ended = Turns(), list[float]()
    paces = [SLOW_BYTES_S * 0.5, SLOW_BYTES_S * 0.1, *[SLOW_BYTES_S * 100.0] * (AT_ONCE - 2)]
    events = [asyncio.Event() for _ in paces]
    tasks = [
        asyncio.create_task(sender(turns, *pair, ended=ended, started=event))
        for pair, event in zip([(pace,) for pace in paces], events, strict=True)
    ]
    for event in events:
        await event.wait()
    async with asyncio.timeout(60), turns.turn():
        assert ended[0] == SLOW_BYTES_S * 0.1
    assert SLOW_BYTES_S * 100.0 not in ended
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_slow_sender_that_nobody_waits_behind_goes_on() -> None:
    turns, ended, event = Turns(), list[float](), asyncio.Event()
    task = asyncio.create_task(sender(turns, 10.0, ended, event))
    await event.wait()
    for _ in range(AT_ONCE):
        async with turns.turn():
            await asyncio.sleep(0.05)
    assert not task.done()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_those_that_wait_are_bounded_and_one_that_gives_up_takes_no_turn_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(upload_turns, "MOST_WAITING", 1)
    turns = Turns()

    async def hold(turn_taken: asyncio.Event) -> None:
        async with turns.turn():
            turn_taken.set()
            await asyncio.sleep(3600)

    taken = [asyncio.Event() for _ in range(AT_ONCE)]
    holders = [asyncio.create_task(hold(event)) for event in taken]
    for event in taken:
        await event.wait()
    monkeypatch.setattr(Turn, "pace", lambda self: None)
    waiting = asyncio.create_task(hold(asyncio.Event()))
    await asyncio.sleep(0.05)
    with pytest.raises(QueueFull, match="wait already"):
        async with turns.turn():
            pass
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    holders[0].cancel()
    async with asyncio.timeout(60), turns.turn():
        pass
    for task in holders:
        task.cancel()
    await asyncio.gather(*holders, return_exceptions=True)
