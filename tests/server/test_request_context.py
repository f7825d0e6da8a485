"""Properties of every route: ids, the shape of errors, the key, the limit on bodies, the log."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

import pytest

from safelight.protocol.config import Config
from safelight.protocol.operations import AbortRequests
from safelight.server.schemas import GenerateBody

from .stage import Stage, stage

pytestmark = pytest.mark.anyio

KEYED = Config(api_key="sécret")
SMALL = Config(max_body_mb=1)


async def test_a_sane_request_id_is_kept_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "safelight")
    async with stage() as played:
        reply = await played.client.post("/generate", json={"prompt": 1}, headers={"X-Request-Id": "job-7:a.b_c"})
    assert reply.headers["x-request-id"] == "job-7:a.b_c"
    assert reply.json()["error"]["request_id"] == "job-7:a.b_c"
    assert any("POST /generate 422" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("sent", ["", "a b", "-x", "x" * 129, "a\tb", "é"])
async def test_another_request_id_is_replaced(sent: str) -> None:
    async with stage() as played:
        reply = await played.client.get("/liveness", headers={b"X-Request-Id": sent.encode("latin-1")})
    assert len(reply.headers["x-request-id"]) == 32


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("POST", "/generate/", 404, "not_found"),
        ("GET", "/generate", 405, "method_not_allowed"),
        ("DELETE", "/health", 405, "method_not_allowed"),
    ],
)
async def test_unknown_routes_and_methods_answer_in_the_contract_s_shape(
    method: str, path: str, status: int, code: str
) -> None:
    async with stage() as played:
        reply = await played.client.request(method, path)
    assert reply.status_code == status
    error = reply.json()["error"]
    assert (error["code"], error["field"], error["request_id"]) == (code, None, reply.headers["x-request-id"])
    assert ("allow" in reply.headers) == (status == 405)


async def test_a_fault_of_ours_is_a_500_without_the_exception_s_text(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def break_(*_: object) -> None:
        raise RuntimeError("CUDA out of secrets")

    monkeypatch.setattr("safelight.server.generate.check_ranges", break_)
    async with stage() as played:
        reply = await played.client.post("/generate", json={"prompt": "a"})
    assert reply.status_code == 500
    assert reply.json()["error"]["code"] == "internal"
    assert "secrets" not in reply.text
    assert "CUDA out of secrets" in caplog.text


@pytest.mark.parametrize("path", ["/server_info", "/metrics", "/nothing", "/generate"])
@pytest.mark.parametrize(
    ("header", "status", "code"),
    [
        (None, 401, "unauthorized"),
        ("", 401, "unauthorized"),
        ("sécret", 401, "unauthorized"),
        ("Basic sécret", 401, "unauthorized"),
        ("Bearer", 401, "unauthorized"),
        ("Bearer secret", 403, "forbidden"),
    ],
)
async def test_a_key_is_asked_for(path: str, header: str | None, status: int, code: str) -> None:
    headers = {} if header is None else {b"Authorization": header.encode()}
    async with stage(KEYED) as played:
        reply = await played.client.get(path, headers=headers)
    assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)
    assert ("www-authenticate" in reply.headers) == (status == 401)


async def test_the_right_key_opens_and_health_needs_none() -> None:
    async with stage(KEYED) as played:
        headers = {b"Authorization": "bearer sécret".encode()}
        assert (await played.client.get("/server_info", headers=headers)).status_code == 200
        for path in ("/liveness", "/health", "/health_generate"):
            assert (await played.client.get(path)).status_code == 200


async def test_an_announced_body_over_the_limit_is_refused_before_it_is_sent() -> None:
    sent = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(1000):
            sent += 1
            yield bytes(100_000)

    async with stage(SMALL) as played:
        headers = {"Content-Length": "100000000"}
        request = played.client.build_request("POST", "/generate", content=body(), headers=headers)
        reply = await played.client.send(request)
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "body_too_large")
    assert "1 MB" in reply.json()["error"]["message"]


async def test_a_body_of_unknown_length_is_cut_off_at_the_limit() -> None:
    async def body() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield bytes(100_000)

    async with stage(SMALL) as played:
        reply = await played.client.post("/generate", content=body())
        after = await played.client.post("/generate", json={"prompt": "a"})
    assert reply.status_code == 413
    assert after.status_code == 200


async def test_a_body_of_just_the_limit_is_read() -> None:
    body = b'{"prompt": "a"}'.ljust(1_000_000)
    async with stage(SMALL) as played:
        assert (await played.client.post("/generate", content=body)).status_code == 200
        assert (await played.client.post("/generate", content=body + b" ")).status_code == 413


async def test_the_documentation_shows_the_body_s_fields() -> None:
    async with stage() as played:
        schema = (await played.client.get("/openapi.json")).json()
    body = schema["paths"]["/generate"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["properties"].keys() == GenerateBody.model_fields.keys()
    assert all("description" in field for field in body["properties"].values())
    assert body["required"] == ["prompt"]


async def test_requests_are_counted_by_route_and_status_with_no_text_from_clients() -> None:
    async with stage() as played:
        await played.client.post("/generate", json={"prompt": "a"})
        await played.client.get('/no"thing%0A')
        assert await played.metric('safelight_requests_total{route="/generate",status="200"}') == 1
        assert await played.metric('safelight_requests_total{route="unmatched",status="404"}') == 1
        assert await played.metric('safelight_request_seconds_count{route="/generate"}') == 1


async def test_without_administration_no_route_changes_the_server() -> None:
    """Every route for anything but GET is listed here as one of the kinds."""
    async with stage(Config(admin=False)) as played:
        paths = (await played.client.get("/openapi.json")).json()["paths"]
        assert {path for path, methods in paths.items() if methods.keys() != {"get"}} == {
            "/encode",
            "/generate",
            "/rollout/generate",
        }
        for path in ("/set_lora", "/update_weights_from_disk", "/release_memory_occupation", "/abort_request"):
            assert (await played.client.post(path, json={})).status_code == 404
        assert (await played.client.post("/generate", json={"prompt": "a"})).status_code == 200


async def test_a_name_that_a_client_chose_ends_no_other_s_request() -> None:
    async with stage() as played:
        named = await played.client.post("/generate", json={"prompt": "a"}, headers={"X-Request-Id": "job"})
        plain = await played.client.post("/generate", json={"prompt": "a"})
        own = [reply.headers["x-safelight-id"] for reply in (named, plain)]
        assert [generate.request_id for generate in played.scheduler.generates()] == own
        assert all(len(one.rpartition(".")[2]) == 32 for one in own)
        assert (named.headers["x-request-id"], plain.headers["x-request-id"]) == ("job", own[1])
        refused = await played.client.post("/abort_request", json={"request_id": "job"})
        assert (refused.status_code, refused.json()["error"]["field"]) == (400, "request_id")
        await _abort(played, own[0])
        assert [(message.name, message.exact) for message in _aborts(played)] == [(own[0], True)]


async def test_with_the_key_a_client_aborts_a_request_by_its_name() -> None:
    async with stage(Config(api_key="k")) as played:
        played.client.headers["Authorization"] = "Bearer k"
        await _abort(played, "job")
        assert [(message.name, message.exact) for message in _aborts(played)] == [("job", False)]


async def _abort(played: Stage, request_id: str) -> None:
    """Without its answer, which the played scheduler does not give."""
    asked = asyncio.create_task(played.client.post("/abort_request", json={"request_id": request_id}))
    await played.until(lambda: _aborts(played), 60)
    asked.cancel()


def _aborts(played: Stage) -> list[AbortRequests]:
    return [message for message in played.scheduler.received if isinstance(message, AbortRequests)]


async def test_an_access_line_says_which_path_was_not_found_and_what_was_refused_and_why(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "safelight.server.request_context")
    async with stage() as played:
        await played.client.get("/v1/imagez%20200%0aforged?key=secret")
        await played.client.post("/generate", json={"prompt": "a", "width": 3})
        await played.client.post("/generate", json={"prompt": "a"})
    missing, refused, served = [record for record in caplog.records if record.name.endswith("request_context")]
    assert missing.getMessage().startswith("GET /v1/imagez%20200%0aforged 404 ")
    assert " ms invalid_request width: width must be a multiple of 16" in refused.getMessage()
    fields = vars(refused)["fields"]
    assert (fields["method"], fields["path"], fields["status"]) == ("POST", "/generate", 400)
    assert (fields["code"], fields["field"]) == ("invalid_request", "width")
    assert fields["error"].startswith("width must be a multiple of 16")
    assert served.getMessage().endswith(" ms")
    assert {*vars(served)["fields"]} == {"method", "path", "status", "duration_ms"}


async def test_a_method_of_a_client_s_own_fills_no_log_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "safelight.server.request_context")
    async with stage() as played:
        reply = await played.client.request("A" * 10_000, "/generate", headers={"Connection": "close"})
    assert (reply.status_code, len(reply.content) < 1000) == (405, True)
    (line,) = [record.getMessage() for record in caplog.records if record.name.endswith("request_context")]
    assert len(line) < 1000
