"""A real browser with a page that attacks the server: `apt install chromium` has it; without one this is skipped."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from safelight.protocol.config import Config
from safelight.protocol.generation import Cancel
from safelight.server.listener import listen

from .stage import stage

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium on the PATH: apt install chromium"),
]

PAGE = """<!doctype html><form id=form method=post enctype=text/plain target=frame><input name='{"mode": "wait", "x": "'
value='"}'></form><iframe name=frame></iframe><script>
async function tried(how) {
  try { return (await how()).status; } catch { return "blocked"; }
}
const server = "SERVER", body = JSON.stringify({prompt: "a"});
const json = {"Content-Type": "application/json"}, text = {"Content-Type": "text/plain"};
async function all() {
  const found = {
    json: await tried(() => fetch(server + "/generate", {method: "POST", headers: json, body})),
    text: await tried(() => fetch(server + "/generate", {method: "POST", mode: "no-cors", headers: text, body})),
    pause: await tried(() => fetch(server + "/pause_generation", {method: "POST", mode: "no-cors", body: "{}"})),
    empty: await tried(() => fetch(server + "/release_memory_occupation", {method: "POST", mode: "no-cors"})),
    form: await tried(() => fetch(server + "/generate", {method: "POST", mode: "no-cors", body: new FormData()})),
    read: await tried(() => fetch(server + "/server_info")),
  };
  document.getElementById("form").action = server + "/pause_generation";
  const loaded = new Promise(done => document.querySelector("iframe").onload = done);
  document.getElementById("form").submit();
  await loaded;
  await fetch("/report", {method: "POST", body: JSON.stringify(found)});
}
all();
</script>"""


class EvilSite:
    """A web server that has one page and waits for its report."""

    def __init__(self, target: str) -> None:
        self._page = PAGE.replace("SERVER", target).encode()
        self.report: asyncio.Future[dict[str, object]] = asyncio.get_running_loop().create_future()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            await self._answer(reader, writer)  # a browser opens connections that it does not use

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        if head.startswith("post /report"):
            size = int(head.partition("content-length:")[2].split()[0])
            self.report.set_result(json.loads(await reader.readexactly(size)))
        page = self._page if head.startswith("get / ") else b""
        writer.write(b"HTTP/1.0 200 OK\r\nContent-Type: text/html\r\n\r\n" + page)


@contextlib.asynccontextmanager
async def chromium(url: str, profile: Path) -> AsyncIterator[None]:
    assert CHROMIUM is not None
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    process = await asyncio.create_subprocess_exec(
        *(CHROMIUM, *flags, f"--user-data-dir={profile}", "--remote-debugging-port=0", url),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        process.terminate()
        await process.wait()


async def attack(target: str, host: str, profile: Path) -> dict[str, object]:
    """The findings of the page at ``host``, which tries everything that a page can."""
    site = EvilSite(target)
    async with await asyncio.start_server(site.answer, "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        async with chromium(f"http://{host}:{port}/", profile):
            return await asyncio.wait_for(site.report, 60)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"], ids=["cross-site", "same-site"])
async def test_no_page_of_another_origin_changes_or_reads_the_server(host: str, tmp_path: Path) -> None:
    async with stage() as played:
        found = await attack(played.url, host, tmp_path)
        assert [found["json"], found["read"]] == ["blocked", "blocked"]
        hellos = {Cancel("")}  # the link's own, as often as a busy machine has it ask again
        assert {*played.scheduler.received} == hellos, "nothing of the page's"
        reply = await played.client.post("/generate", content=b'{"prompt": "a"}')
        assert reply.status_code == 200, "and programs are served as before"


async def test_a_page_of_a_listed_origin_draws(tmp_path: Path) -> None:
    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    async with stage(Config(cors_origins=f"http://localhost:{port}")) as played:
        site = EvilSite(played.url)
        listening = await asyncio.start_server(site.answer, "127.0.0.1", port)
        async with listening, chromium(f"http://localhost:{port}/", tmp_path):
            await played.until(played.scheduler.generates, 60)
