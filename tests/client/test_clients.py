"""Both clients against a server that plays its part: requests, streams, errors, waiting and going away."""

from __future__ import annotations

import asyncio
import base64
import threading

import pytest

from safelight.client import (
    AsyncClient,
    Client,
    ConnectionLost,
    DeadlinePassed,
    Forbidden,
    Health,
    Internal,
    InvalidRequest,
    NotFound,
    Preview,
    Progress,
    Queued,
    Result,
    SafelightError,
    Unavailable,
)

from .played_server import Draw, PlayedServer, Reply, error_reply, event, event_reply, generation, json_reply, png

PREVIEW = {"output": 0, "step": 2, "steps": 4, "b64": base64.b64encode(png()).decode()}
STREAM = (
    event("queued", {"position": 2}),
    event("progress", {"output": 0, "step": 1, "steps": 4}),
    b": still working\n\n",
    event("preview", PREVIEW),
    event("something_new", {"x": 1}),
    event("result", generation()),
)
STARTING = error_reply(503, "unavailable", "No replica is ready: they are starting.", retry_after="5")


def test_a_request_is_posted_as_json(draw: Draw) -> None:
    with PlayedServer(json_reply(generation())) as server:
        assert draw(server, "a red circle", seed=7, steps=4).outputs[0].seed == 7
    (request,) = server.requests
    assert (request.method, request.path) == ("POST", "/generate")
    assert request.headers["content-type"] == "application/json"
    assert "authorization" not in request.headers
    assert request.body == {"prompt": "a red circle", "seed": 7, "num_inference_steps": 4}


def test_a_stream_gives_typed_events_and_ends_with_the_result(draw: Draw) -> None:
    with PlayedServer(event_reply(*STREAM)) as server:
        queued, progress, preview, result = draw(server, "a", stream=True)
    assert server.requests[0].body == {"prompt": "a", "stream": True}
    assert queued == Queued(2)
    assert progress == Progress(output=0, step=1, steps=4)
    assert isinstance(preview, Preview)
    assert preview.image.size == (8, 8)
    assert isinstance(result, Result)
    assert result.generation.outputs[0].data == png()


@pytest.mark.parametrize("cut", [False, True])
def test_a_stream_without_a_result_is_an_error(draw: Draw, cut: bool) -> None:
    with PlayedServer(event_reply(*STREAM[:2], cut=cut)) as server, pytest.raises(ConnectionLost):
        draw(server, "a", stream=True)


def test_an_error_event_is_raised_with_its_class(draw: Draw) -> None:
    error = {"error": {"code": "deadline_passed", "message": "Too late.", "field": None, "request_id": "r9"}}
    with (
        PlayedServer(event_reply(STREAM[0], event("error", error))) as server,
        pytest.raises(DeadlinePassed, match=r"Too late\. \(request r9\)"),
    ):
        draw(server, "a", stream=True)


def test_an_error_reply_is_raised_with_its_class_field_and_request_id(draw: Draw) -> None:
    body = {"error": {"code": "invalid_request", "message": "Too wide.", "field": "width", "request_id": "r9"}}
    with (
        PlayedServer(json_reply(body, 400)) as server,
        pytest.raises(InvalidRequest, match=r"Too wide\. \(request r9\)") as raised,
    ):
        draw(server, "a")
    assert raised.value.field == "width"


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (json_reply({"error": {"message": "No.", "type": "x", "code": "someone_elses"}}, 404), NotFound),
        (Reply(403, (b"<html>",)), Forbidden),
        (Reply(502, (b"Bad gateway",)), Internal),
        (Reply(307, headers={"location": "/elsewhere"}), Internal),
    ],
    ids=["a foreign code", "a proxy's page", "no gateway", "a redirect"],
)
def test_an_answer_that_is_not_the_servers_own_goes_by_its_status(
    draw: Draw, reply: Reply, kind: type[SafelightError]
) -> None:
    with PlayedServer(reply) as server, pytest.raises(SafelightError) as raised:
        draw(server, "a")
    assert type(raised.value) is kind


def test_the_key_is_sent_as_a_bearer_token() -> None:
    with PlayedServer(json_reply({})) as server, Client(server.url, api_key="k") as client:
        client.info()
    assert server.requests[0].headers["authorization"] == "Bearer k"


def test_a_silent_server_is_given_up_on() -> None:
    with (
        PlayedServer(Reply(hang=True)) as server,
        Client(server.url, timeout=0.2) as client,
        pytest.raises(DeadlinePassed, match="timeout"),
    ):
        client.generate("a")


def test_health_is_an_answer_also_when_it_is_bad() -> None:
    with PlayedServer(STARTING, json_reply({"status": "ok"})) as server, Client(server.url) as client:
        assert client.health() == Health(False, "No replica is ready: they are starting.")
        assert client.health().ready


def test_another_program_at_the_address_is_not_taken_for_a_healthy_server() -> None:
    with (
        PlayedServer(Reply(200, (b"<html>",))) as server,
        Client(server.url) as client,
        pytest.raises(Internal, match="is not that of a Safelight server"),
    ):
        client.health()


def test_waiting_tells_what_it_waits_for_once_each() -> None:
    heard: list[str] = []
    with PlayedServer(STARTING, STARTING, json_reply({"status": "ok"})) as server, Client(server.url) as client:
        client.wait_until_ready(30, lambda health: heard.append(health.reason))
    assert heard == ["No replica is ready: they are starting."]


def test_waiting_ends_in_time_and_says_what_was_missing() -> None:
    async def wait(url: str) -> None:
        async with AsyncClient(url) as client:
            await client.wait_until_ready(0.5)

    with PlayedServer(STARTING) as server, pytest.raises(Unavailable, match="they are starting"):
        asyncio.run(wait(server.url))


def test_cancelling_a_call_closes_its_connection() -> None:
    async def cancel(url: str) -> None:
        async with AsyncClient(url) as client:
            task = asyncio.create_task(client.generate("a"))
            await asyncio.sleep(0.3)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(server.client_gone.wait, 5)  # while the client itself is still open

    with PlayedServer(Reply(hang=True)) as server:
        asyncio.run(cancel(server.url))


def test_leaving_an_async_stream_closes_its_connection() -> None:
    async def leave(url: str) -> None:
        async with AsyncClient(url) as client:
            async for _ in client.stream("a"):
                break
            assert await asyncio.to_thread(server.client_gone.wait, 5)

    with PlayedServer(event_reply(STREAM[0], hang=True)) as server:
        asyncio.run(leave(server.url))


def test_leaving_a_stream_closes_its_connection() -> None:
    with PlayedServer(event_reply(STREAM[0], hang=True)) as server, Client(server.url) as client:
        for _ in client.stream("a"):
            break
        assert server.client_gone.wait(5)


def test_a_client_serves_many_threads() -> None:
    with PlayedServer(json_reply(generation())) as server, Client(server.url) as client:
        threads = [threading.Thread(target=client.generate, args=("a",)) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(server.requests) == 16


def test_more_calls_run_at_once_than_httpx_allows_by_default() -> None:
    async def many(url: str) -> None:
        async with AsyncClient(url) as client:
            calls = [asyncio.create_task(client.generate("a")) for _ in range(130)]
            while len(server.requests) < len(calls):
                await asyncio.sleep(0.02)
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)

    with PlayedServer(Reply(hang=True)) as server:
        asyncio.run(asyncio.wait_for(many(server.url), 60))
