"""No foreign web page reaches a route, unless its origin is listed; programs go on as before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute

from safelight.protocol.adapters import AdapterState
from safelight.protocol.config import Config
from safelight.protocol.errors import StartFailed
from safelight.protocol.generation import Generate
from safelight.protocol.operations import Operate, Pause
from safelight.protocol.reports import Operated
from safelight.server.app import CHANGING_GETS, create_app
from safelight.server.callers import Callers
from safelight.server.flags import read_config
from safelight.server.scheduler_link import SchedulerLink
from safelight.server.service import Service

from .stage import Stage, stage
from .test_connections import strangers

pytestmark = pytest.mark.anyio

LISTED = Config(cors_origins="https://app.example.com, http://localhost:5173", allowed_hosts="gpu.example.com")
ROUTES = [
    ("GET", "/health"),
    ("GET", "/liveness"),
    ("GET", "/nothing"),
    ("GET", "/flush_cache"),
    ("GET", "/server_info?x=/health"),
    ("POST", "/generate"),
    ("POST", "/pause_generation"),
    ("POST", "/update_weights_from_disk"),
    ("OPTIONS", "/generate"),
]


async def ask(played: Stage, method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
    content = b'{"prompt": "a"}' if path == "/generate" else b"{}"
    reply = await played.client.request(method, path, headers=headers, content=content if method == "POST" else None)
    return reply.status_code, reply.json()["error"]["code"] if reply.status_code >= 400 else ""


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example", "Content-Type": "text/plain"},
        {"Origin": "http://evil.example", "Content-Type": "application/json"},
        {"Origin": "null", "Content-Type": "text/plain"},
        {"Origin": ""},
        {"Origin": "http://localhost:1"},
        {"Origin": "http://127.0.0.1"},
        {"Origin": "http://localhost.evil.example"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "Cross-Site"},
        {"Sec-Fetch-Site": "anything"},
        {"Origin": "http://evil.example", "Sec-Fetch-Site": "same-origin"},
        {"Host": "evil.example"},
        {"Host": "127.0.0.1.evil.example"},
        {"Host": "localhost@evil.example"},
        {"Host": "192.0.2.1"},
        {"Host": ""},
    ],
)
async def test_a_foreign_page_or_a_rebound_name_reaches_no_route(headers: dict[str, str]) -> None:
    async with stage() as played:
        asked = [await ask(played, *route, headers) for route in ROUTES]
        assert asked == [(403, "forbidden")] * len(ROUTES)
        assert played.scheduler.generates() == []
        assert not any(isinstance(message, Pause) for message in played.scheduler.received)


CHROMIUM = "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/140.0.0.0 Safari/537.36"
EMBEDDED = [
    {"User-Agent": CHROMIUM, "Accept": "image/avif,image/webp,*/*;q=0.8", "Referer": "http://192.0.2.7:8000/"},
    {"User-Agent": CHROMIUM, "Accept": "*/*"},
    {"User-Agent": "curl/8", "Sec-Fetch-Dest": "image"},
    {"User-Agent": "curl/8", "Referer": ""},
    {"User-Agent": CHROMIUM, "Sec-Fetch-Site": "none", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"},
    {"User-Agent": CHROMIUM, "Sec-Fetch-Site": "same-origin", "Sec-Fetch-Dest": "image"},
]


PROGRAMS = [
    {"User-Agent": "curl/8.5.0"},
    {"User-Agent": "python-requests/2.32"},
    {"User-Agent": ""},
    {"User-Agent": "node", "Accept": "*/*", "Accept-Language": "*", "Sec-Fetch-Mode": "cors"},
]


async def test_a_get_that_a_page_embeds_changes_nothing() -> None:
    """A page on the LAN asks a server on the LAN: browsers send no Origin and no Sec-Fetch-Site there."""
    async with stage() as played:
        played.scheduler.operated = lambda message: (
            [Operated(message.request_id, {}, "1", [], AdapterState())] if isinstance(message, Operate) else []
        )
        for headers in EMBEDDED:
            for path in sorted(CHANGING_GETS):
                reply = await played.client.get(path, headers=headers)
                assert (reply.status_code, "POST" in reply.text) == (403, True)
        assert not any(isinstance(message, Operate) for message in played.scheduler.received)
        for program in PROGRAMS:
            assert (await played.client.get("/flush_cache", headers=program)).status_code == 200


def api_routes(routes: Iterable[BaseRoute]) -> Iterator[APIRoute]:
    for route in routes:
        if isinstance(route, APIRoute):
            yield route
        elif (router := getattr(route, "original_router", None)) is not None:
            yield from api_routes(router.routes)


def test_each_get_that_changes_the_server_is_known_as_one(tmp_path: Path) -> None:
    """``--no-admin`` leaves the routes that change nothing; none of them takes HEAD, which would do what GET does."""

    def gets(*, admin: bool) -> set[str]:
        app = create_app(Service(Config(admin=admin), SchedulerLink(f"ipc://{tmp_path}/none"), tmp_path))
        routes = list(api_routes(app.routes))
        assert not any("HEAD" in route.methods for route in routes)
        return {route.path for route in routes if "GET" in route.methods}

    assert {"/health", "/list_loras"} <= gets(admin=False)
    assert gets(admin=True) - gets(admin=False) == CHANGING_GETS


async def test_programs_need_no_content_type_and_no_origin() -> None:
    async with stage() as played:
        for kind in ("application/x-www-form-urlencoded", "text/plain", "application/json", ""):
            assert (await ask(played, "POST", "/generate", {"Content-Type": kind}))[0] == 200
        for host in ("localhost", "LOCALHOST:9", "127.0.0.1", "127.8.9.10:80", "[::1]:30000", "localhost."):
            assert (await ask(played, "GET", "/health", {"Host": host}))[0] == 200


async def test_the_server_s_own_page_may_send_what_no_other_page_could() -> None:
    async with stage() as played:
        own = {"Origin": played.url, "Sec-Fetch-Site": "same-origin"}
        assert (await ask(played, "POST", "/generate", {**own, "Content-Type": "application/json"}))[0] == 200
        assert (await ask(played, "POST", "/generate", {**own, "Content-Type": "text/plain"}))[0] == 422
        assert (await ask(played, "POST", "/generate", {**own, "Content-Type": ""}))[0] == 422
        assert (await ask(played, "GET", "/health", own))[0] == 200
        typed = {**own, "Content-Type": "application/msgpack"}
        assert (await ask(played, "POST", "/generate", typed))[0] == 422, "it is another route's type"
        form = {**own, "Content-Type": "multipart/form-data; boundary=a"}
        assert (await ask(played, "POST", "/pause_generation", form))[0] == 422, "any page can send a form"


async def test_a_listed_origin_is_answered_as_browsers_ask() -> None:
    origin = "https://app.example.com"
    headers = {"Origin": origin, "Sec-Fetch-Site": "cross-site", "Content-Type": "application/json"}
    async with stage(LISTED) as played:
        asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
        preflight = await played.client.options("/generate", headers={"Origin": origin, **asks})
        reply = await played.client.post("/generate", headers=headers, json={"prompt": "a"})
        refused = await played.client.post("/generate", headers=headers, json={"prompt": 1})
        other = await played.client.options("/generate", headers={"Origin": "https://example.com", **asks})
    for answer, status in ((preflight, 200), (reply, 200), (refused, 422)):
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, origin)
    assert other.status_code == 403
    assert "access-control-allow-origin" not in other.headers


async def test_a_listed_host_is_right_and_others_stay_wrong() -> None:
    async with stage(LISTED) as played:
        assert (await ask(played, "GET", "/health", {"Host": "GPU.example.com:8080"}))[0] == 200
        assert (await ask(played, "GET", "/health", {"Host": "other.example.com"}))[0] == 403
    async with stage(Config(allowed_hosts="*")) as played:
        assert (await ask(played, "GET", "/health", {"Host": "any.example.com"}))[0] == 200


def test_the_address_that_a_connection_came_in_on_is_a_right_host() -> None:
    """A server on all addresses has many."""
    callers = Callers.of(Config(host="0.0.0.0"), {})
    scope = {"type": "http", "path": "/", "server": ("192.0.2.7", 80), "headers": [(b"host", b"192.0.2.7:80")]}
    callers.check(scope)
    callers.check({**scope, "server": ("::ffff:192.0.2.7", 80)})


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--cors-origins", "*"), ("--cors-origins", "example.com"), ("--cors-origins", "https://a.example/path"),
     ("--cors-origins", "null"), ("--allowed-hosts", "http://a.example")],
)  # fmt: skip
async def test_a_list_that_cannot_be_read_ends_the_start(flag: str, value: str) -> None:
    with pytest.raises(StartFailed, match=flag):
        read_config([flag, value], {})


@pytest.mark.parametrize(
    "head",
    [
        "POST /generate HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked",
        "POST /generate HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 5",
        "GET /health HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 5",
        "POST /generate HTTP/1.0\r\nTransfer-Encoding: chunked",
        "POST /generate HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6",
        "POST /generate HTTP/1.1\r\nContent-Length: +5",
        "POST /generate HTTP/1.1\r\nTransfer-Encoding: chunked, identity",
        "POST /generate HTTP/1.1\r\nTransfer-Encoding : chunked",
    ],
)
async def test_a_body_with_two_ends_is_refused_and_what_follows_it_is_not_read(head: str) -> None:
    smuggled = "0\r\n\r\nPOST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 15\r\n\r\n" + '{"prompt": "a"}'
    async with (
        stage() as played,
        strangers(played, 1, f"{head}\r\nHost: localhost\r\n\r\n{smuggled}".encode()) as (got,),
    ):
        answer = await got.read()  # to the connection's end
        assert answer.split()[1] in (b"400", b"501")
        assert answer.count(b"HTTP/1.1 ") == 1
        assert played.scheduler.generates() == []


async def test_an_ipv4_client_of_a_socket_for_both_families_is_as_near_as_it_is() -> None:
    body = {"prompt": "a", "rollout": True, "rollout_shared_memory": True}
    async with stage(host="::") as played:
        await played.client.post("/rollout/generate", json=body)
        await played.until(lambda: any(isinstance(message, Generate) for message in played.scheduler.received))
