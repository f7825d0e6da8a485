"""When things go wrong with the real processes: what stops, who notices, and what the neighbours get."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch

from safelight.tests.live import LiveServer

from .asking import ask, ask_together, body, metric, picture, stats

LONG = 1000


def steps_seen(url: str, stop_after: int) -> int:
    """Stream a long request, close the connection after ``stop_after`` steps; returns how many were seen."""
    asked = body("flux", num_inference_steps=LONG, stream=True)
    seen = 0
    with httpx.stream("POST", f"{url}/generate", json=asked, timeout=60) as answer:
        for line in answer.iter_lines():
            seen += line == "event: progress"
            if seen == stop_after:
                break
    return seen


def test_a_client_that_goes_away_stops_its_work_and_is_counted(flux: LiveServer) -> None:
    before = metric(flux.url, "safelight_requests_total", status="499")
    steps_seen(flux.url, 3)
    flux.wait_for(lambda: metric(flux.url, "safelight_requests_total", status="499") == before + 1 or None, 5)
    flux.wait_for(lambda: stats(flux.url)["cancelled"] or None, 5)
    calls = stats(flux.url)["calls"]
    assert calls < LONG / 2
    time.sleep(2.5)
    assert stats(flux.url)["calls"] == calls, "the worker went on for nobody"


def test_a_deadline_is_a_504_and_stops_the_work(flux: LiveServer) -> None:
    answer = httpx.post(f"{flux.url}/generate", json=body("flux", num_inference_steps=LONG, timeout_s=0.3), timeout=30)
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_passed")
    flux.wait_for(lambda: stats(flux.url)["running"] == 0 or None, 5)


def test_kill_9_of_a_worker_is_a_503_and_then_a_new_worker(checkpoint: Callable[[str], Path]) -> None:
    with LiveServer(checkpoint("flux"), ["--threads", "1"]) as server, ThreadPoolExecutor() as pool:
        server.wait_ready()
        first = picture(ask(server.url, body("flux")))
        inflight = [
            pool.submit(httpx.post, f"{server.url}/generate", json=body("flux", num_inference_steps=LONG), timeout=60)
            for _ in range(3)
        ]
        server.wait_for(lambda: metric(server.url, "safelight_running") >= 3 or None, 10)
        killed = server.children()["worker"]
        killed.kill()
        began = time.monotonic()
        answers = [future.result() for future in inflight]
        assert [answer.status_code for answer in answers] == [503] * 3
        assert all("Retry-After" in answer.headers for answer in answers)
        assert time.monotonic() - began < 5
        health = httpx.get(f"{server.url}/health")
        assert health.status_code == 503
        assert health.json()["replicas"][0]["message"]
        server.wait_ready()
        assert server.children()["worker"].pid != killed.pid
        assert torch.equal(picture(ask(server.url, body("flux"))), first)


def test_two_replicas_share_the_load_and_outlive_each_other(checkpoint: Callable[[str], Path]) -> None:
    with LiveServer(checkpoint("flux"), ["--threads", "1", "--replicas", "2"]) as server:
        server.wait_for(lambda: len(ready_replicas(server)) == 2 or None, 120)
        answers = ask_together(server.url, [body("flux", index % 6, num_inference_steps=60) for index in range(8)])
        assert [answer.status_code for answer in answers] == [200] * 8
        server.wait_for(lambda: sum(outputs(server)) == 8 or None, 10)
        assert min(outputs(server)) >= 3
        server.children()["worker"].kill()
        server.wait_for(lambda: len(ready_replicas(server)) == 1 or None, 10)
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert ask_together(server.url, [body("flux")])[0].status_code == 200


def ready_replicas(server: LiveServer) -> list[int]:
    replicas = httpx.get(f"{server.url}/server_info").json()["replicas"]
    return [replica["replica"] for replica in replicas if replica["state"] == "ready"]


def outputs(server: LiveServer) -> list[int]:
    return [replica["stats"]["outputs"] for replica in httpx.get(f"{server.url}/server_info").json()["replicas"]]


def test_a_full_queue_is_a_429_that_says_when_to_come_back(checkpoint: Callable[[str], Path]) -> None:
    flags = ["--threads", "1", "--max-running", "1", "--max-queue", "2"]
    with LiveServer(checkpoint("flux"), flags) as server, ThreadPoolExecutor(8) as pool:
        server.wait_ready()
        worker = server.children()["worker"]
        worker.suspend()
        asked = [pool.submit(httpx.post, f"{server.url}/generate", json=body("flux"), timeout=60) for _ in range(8)]
        server.wait_for(lambda: sum(future.done() for future in asked) == 5 or None, 10)
        worker.resume()
        answers = [future.result() for future in asked]
        counted = [answer.status_code for answer in answers]
        assert counted.count(200) == 3
        assert counted.count(429) == 5
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert int(refused.headers["Retry-After"]) >= 1
        assert refused.json()["error"]["code"] == "queue_full"


def test_a_higher_priority_goes_first(checkpoint: Callable[[str], Path]) -> None:
    finished: list[str] = []

    def one(url: str, name: str, priority: int, steps: int) -> None:
        ask(url, body("flux", num_inference_steps=steps, priority=priority))
        finished.append(name)

    with (
        LiveServer(checkpoint("flux"), ["--threads", "1", "--max-running", "1"]) as server,
        ThreadPoolExecutor() as pool,
    ):
        server.wait_ready()
        worker = server.children()["worker"]
        futures = [pool.submit(one, server.url, "first", 0, LONG)]
        server.wait_for(lambda: metric(server.url, "safelight_running") == 1 or None, 10)
        worker.suspend()
        queued = "safelight_queued_requests"
        for waiting, (name, priority) in enumerate((("low", 0), ("high", 5)), start=1):
            futures.append(pool.submit(one, server.url, name, priority, 60))
            server.wait_for(lambda waiting=waiting: metric(server.url, queued) == waiting or None, 10)
        worker.resume()
        for future in futures:
            future.result()
    assert finished == ["first", "high", "low"]


def test_sigterm_finishes_what_runs(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    with LiveServer(checkpoint("flux"), ["--threads", "1"], temporary=tmp_path) as server, ThreadPoolExecutor() as pool:
        server.wait_ready()
        running = pool.submit(ask, server.url, body("flux", num_inference_steps=LONG))
        server.wait_for(lambda: metric(server.url, "safelight_running") >= 1 or None, 10)
        server.signal(signal.SIGTERM)
        assert picture(running.result()).ndim == 3
        assert server.wait_exit() == 0
        assert server.survivors() == []
    assert list(tmp_path.glob("safelight-*")) == []


@pytest.mark.parametrize(
    ("changes", "status", "field"),
    [
        ({"num_inference_steps": -1}, 400, "num_inference_steps"),
        ({"num_inference_steps": 0}, 400, "num_inference_steps"),
        ({"num_inference_steps": 10**9}, 400, "num_inference_steps"),
        ({"num_inference_steps": "4"}, 422, "num_inference_steps"),
        ({"num_inference_steps": True}, 422, "num_inference_steps"),
        ({"width": 100}, 400, "width"),
        ({"width": 10**7}, 400, "width"),
        ({"height": -16}, 400, "height"),
        ({"guidance_scale": "high"}, 422, "guidance_scale"),
        ({"num_frames": 5}, 400, "num_frames"),
        ({"n": 0}, 400, "n"),
        ({"n": 10**6}, 400, "n"),
        ({"seed": -1}, 400, "seed"),
        ({"seed": 2**70}, 400, "seed"),
        ({"prompt": ""}, 200, None),
        ({"prompt": 5}, 422, "prompt"),
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": "x" * 20_000}, 400, "prompt"),
        ({"timeout_s": 0}, 400, "timeout_s"),
        ({"output_format": "gif"}, 400, "output_format"),
        ({"output_format": "mp4"}, 400, "output_format"),
        ({"stepz": 4}, 422, "stepz"),
        ({"extra": {"nonsense": 1}}, 400, "extra.nonsense"),
        ({"extra": {"max_sequence_length": "long"}}, 400, "extra.max_sequence_length"),
        ({"extra": {"max_sequence_length": 10**6}}, 400, "extra.max_sequence_length"),
        ({"extra": {"max_sequence_length": 0}}, 400, "extra.max_sequence_length"),
        ({"extra": {"sigmas": ["one"]}}, 400, "extra.sigmas"),
        ({"preview_every": 1}, 400, "preview_every"),
    ],
)
def test_bad_values_are_named_and_change_nothing(
    flux: LiveServer, changes: dict[str, object], status: int, field: str | None
) -> None:
    asked = {"prompt": "a red circle", "num_inference_steps": 1} | changes
    answer = httpx.post(f"{flux.url}/generate", json=asked, timeout=30)
    assert answer.status_code == status, answer.text
    if status != 200:
        error = answer.json()["error"]
        assert error["field"] == field
        assert error["request_id"] == answer.headers["X-Request-Id"]
        assert "Traceback" not in answer.text
    assert flux.healthy


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b'{"prompt": NaN}', 422),
        (b'{"prompt": "a", "guidance_scale": 1e999}', 422),
        (b"[" * 100_000, 413),
        (b'{"prompt": "a", "extra": ' + b'{"a":' * 5000 + b"1" + b"}" * 5001, 422),
        (b"\xff\xfe", 422),
        (b"", 422),
        (b"[1, 2]", 422),
    ],
)
def test_invalid_bodies_are_malformed_requests(flux: LiveServer, content: bytes, status: int) -> None:
    assert httpx.post(f"{flux.url}/generate", content=content).status_code == status


def test_a_body_of_100_mb_is_refused_with_flat_memory(flux: LiveServer) -> None:
    import psutil

    server = psutil.Process(flux.pid)
    before = server.memory_info().rss
    for headers in ({}, {"Transfer-Encoding": "chunked"}):
        content = (b'{"prompt": "' + b"x" * 2**20 for _ in range(100)) if headers else b"x" * (100 * 2**20)
        try:
            answer = httpx.post(f"{flux.url}/generate", content=content, timeout=30)
            assert answer.status_code == 413
        except httpx.TransportError:
            pass  # it hung up in the middle of the body, as it may
    assert server.memory_info().rss - before < 80 * 2**20
    assert flux.healthy
