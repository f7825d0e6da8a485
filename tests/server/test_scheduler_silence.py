"""A scheduler that hangs keeps nobody waiting."""

from __future__ import annotations

import asyncio
import gc
import threading
from pathlib import Path

import pytest
from msgspec.structs import replace

from safelight.protocol.errors import DeadlinePassed, Unavailable
from safelight.protocol.generation import Cancel, Generate, Sample
from safelight.protocol.operations import Digests, Operate
from safelight.server import scheduler_link, subscription
from safelight.server.scheduler_link import SchedulerLink
from safelight.server.subscription import OperationFailed

from .played_scheduler import PlayedScheduler, ready

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subscription, "LATE_S", 0.05)
    monkeypatch.setattr(scheduler_link, "_TICK_S", 0.05)


@pytest.mark.parametrize("timeout_s", [0.1, None])
async def test_a_request_ends_at_its_deadline_though_the_scheduler_says_nothing(
    timeout_s: float | None, tmp_path: Path
) -> None:
    address = f"ipc://{tmp_path}/frontend"
    async with (
        PlayedScheduler(tmp_path, lambda _: []) as scheduler,
        SchedulerLink(address, request_timeout_s=0.1) as link,
    ):
        message = Generate(request_id="r", samples=[Sample("a red circle", 1)], timeout_s=timeout_s)
        with link.submit(message) as events, pytest.raises(DeadlinePassed, match=r"0\.1 s ran out"):
            await events.result()
        async with asyncio.timeout(60):
            while "r" not in scheduler.cancelled():
                await asyncio.sleep(0.01)


async def test_an_operation_ends_when_the_scheduler_is_silent_for_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler_link, "SILENT_S", 0.2)
    async with PlayedScheduler(tmp_path) as scheduler, SchedulerLink(scheduler.address) as link:
        with link.submit(Operate("o", Digests())) as events, pytest.raises(OperationFailed) as failed:
            await events.operated()
        assert isinstance(failed.value.error, Unavailable)


async def test_silence_is_noticed_and_ends_with_any_message(tmp_path: Path) -> None:
    async with PlayedScheduler(tmp_path) as scheduler, SchedulerLink(scheduler.address) as link:
        silence = asyncio.create_task(link.silence(0.5))
        async with asyncio.timeout(60):
            while not scheduler.received:
                await asyncio.sleep(0.01)
            for _ in range(40):  # 1.6 s, in which it would have ended
                await scheduler.say(ready())
                await asyncio.sleep(0.04)
            assert not silence.done()
            assert await silence >= 0.5


async def test_a_new_scheduler_is_greeted_and_what_the_old_one_knew_of_ends(tmp_path: Path) -> None:
    async with SchedulerLink(f"ipc://{tmp_path}/frontend") as link:
        async with PlayedScheduler(tmp_path, lambda _: []) as old, asyncio.timeout(60):
            while not old.received:
                await asyncio.sleep(0.01)
            message = Generate(request_id="r", samples=[Sample("a red circle", 1)], timeout_s=60)
            with link.submit(message) as events:
                link.fail_all(Unavailable("The scheduler was lost."))
                with pytest.raises(Unavailable, match="was lost"):
                    await events.result()
        async with PlayedScheduler(tmp_path) as new, asyncio.timeout(60):
            while Cancel("") not in new.received:
                await asyncio.sleep(0.01)
            await new.say(ready())
            await link.status_where(lambda status: status.replicas or None)


async def test_what_is_sent_to_a_stopped_scheduler_is_bounded_until_it_has_taken_it(tmp_path: Path) -> None:
    async with (
        PlayedScheduler(tmp_path, lambda _: []) as scheduler,
        SchedulerLink(scheduler.address, most_unheard=2000) as link,
        asyncio.timeout(60),
    ):

        def ask(name: str) -> None:
            """A client that goes away at once: what it sent waits all the same."""
            with link.submit(Generate(request_id=name, samples=[Sample("a" * 1000, 1)])):
                pass

        ask("0")
        with pytest.raises(Unavailable, match="yet to take"):
            ask("1")
        while not scheduler.received:
            await asyncio.sleep(0.01)
        await scheduler.say(replace(ready(), heard=1000))
        await link.status_where(lambda status: status.heard or None)
        ask("2")


def test_a_link_that_was_never_entered_is_collected_without_waiting(tmp_path: Path) -> None:
    """A context that is collected in a cycle with its open socket waits for the socket for ever."""

    def collect() -> None:
        link = SchedulerLink(f"ipc://{tmp_path}/none")
        cycle: list[object] = [link]
        cycle.append(cycle)
        del link, cycle
        gc.collect()

    thread = threading.Thread(target=collect, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
