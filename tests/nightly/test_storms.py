"""Storms of hostile clients, of deaths and of trainers, over a live server that goes on and comes back to rest."""

from __future__ import annotations

import json
import random
import resource
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from io import BytesIO
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from safelight.client import Client
from safelight.formats.model_names import embedded_adapter
from safelight.tests.effort import scaled
from safelight.tests.live import LiveServer
from safelight.tests.updates.trainer import Tensors, changed

from .conftest import serving
from .memory import held

QUICK = {"prompt": "a red circle", "width": 64, "height": 64, "num_inference_steps": 1}
_MB = 2**20


def ask(server: LiveServer, body: dict[str, object] = QUICK) -> int:
    return httpx.post(f"{server.url}/generate", json=body, timeout=120).status_code


@contextmanager
def connected(server: LiveServer, number: int, say: bytes) -> Iterator[list[socket.socket]]:
    url = httpx.URL(server.url)
    with ExitStack() as stack:
        sockets = [
            stack.enter_context(socket.create_connection((url.host, url.port or 80), timeout=60)) for _ in range(number)
        ]
        for one in sockets:
            _push(one, say)
        yield sockets


def _push(one: socket.socket, say: bytes) -> None:
    """As much of it as the server reads: it may refuse the rest."""
    try:
        one.sendall(say)
    except OSError:
        return


def test_silent_connections_keep_nobody_out_and_fill_no_log(server: LiveServer) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    lines = server.log.count("\n")
    with (
        connected(server, scaled(1100, 100), b""),
        connected(server, scaled(200, 20), b"POST /generate HTTP/1.1\r\nHo"),
    ):
        assert [ask(server) for _ in range(5)] == [200] * 5
        worker = server.children()["worker"]
        worker.kill()
        server.wait_for(lambda: server.children().get("worker", worker).pid != worker.pid or None, 60)
        server.wait_ready()
        assert ask(server) == 200
    assert server.log.count("\n") - lines < 100


def test_stalled_bodies_hold_no_more_than_their_bound_and_keep_nobody_out(server: LiveServer) -> None:
    size = scaled(60 * _MB, 4 * _MB)
    head = f"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: {size}\r\n\r\n"
    body = b'{"prompt": "' + b"a" * (size * 9 // 10)
    assert ask(server, {"prompt": "a" * (30 * _MB)}) == 413, "after a larger block, glibc would keep these in its heap"
    before = held(server)["server"].memory
    with connected(server, 25, head.encode() + body):
        assert [ask(server) for _ in range(5)] == [200] * 5
        assert held(server)["server"].memory - before < 1100 * _MB
    server.wait_for(lambda: held(server)["server"].memory - before < 50 * _MB or None, 60)


@pytest.mark.parametrize("path", ["/generate", "/update_weights_from_tensor_checker", "/v1/set_lora"])
def test_millions_of_unknown_keys_are_refused_while_others_are_answered(server: LiveServer, path: str) -> None:
    number = scaled(5_000_000, 50_000)
    body = json.dumps({f"key{index}": 0 for index in range(number)}).encode()
    before = held(server)["server"].memory
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(httpx.post, f"{server.url}{path}", content=body, timeout=300)
        answered = _answers_while(server, sent)
    assert 400 <= sent.result().status_code < 500
    assert answered
    server.wait_for(lambda: held(server)["server"].memory - before < 300 * _MB or None, 60)


def test_two_giant_pictures_do_not_hold_up_adapters_or_health(server: LiveServer) -> None:
    side = scaled(4400, 700)
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    file = BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    form = {"prompt": "a red circle", "num_inference_steps": "1"}

    def send() -> httpx.Response:
        files = {"image": ("giant.png", file.getvalue(), "image/png")}
        return httpx.post(f"{server.url}/generate", data=form, files=files, timeout=300)

    with ThreadPoolExecutor(2) as pool, Client(server.url) as client:
        sent = [pool.submit(send) for _ in range(2)]
        client.set_lora("striped", embedded_adapter("striped"), mode="request")
        answered = [_answers_while(server, one) for one in sent]
        client.unload_lora("striped")
    assert all(one.result().status_code in (200, 400, 413, 429) for one in sent), [one.result().text for one in sent]
    assert any(answered)
    assert ask(server) == 200


def test_every_death_of_a_worker_under_load_ends_in_a_committed_version(weights: Tensors, tmp_path: Path) -> None:
    with serving("--weights-journal", str(tmp_path / "journal")) as server, ThreadPoolExecutor(2) as pool:
        ended, statuses = threading.Event(), list[int]()

        def load() -> None:
            while not ended.is_set():
                statuses.append(ask(server))

        loads = [pool.submit(load) for _ in range(2)]
        try:
            _kill_again_and_again(server, weights)
        finally:
            ended.set()
        for one in loads:
            one.result()
    assert {200} <= set(statuses) <= {200, 503}


def _kill_again_and_again(server: LiveServer, weights: Tensors) -> None:
    """At a random moment of an update: its version serves where it was answered with success, else it or the last."""
    choice = random.Random(0)
    with Client(server.url, timeout=120) as client, ThreadPoolExecutor(1) as pool:
        last = client.weights.version()
        digests = {last: client.weights.checksum(["transformer"])["transformer"]}
        for number in range(scaled(60, 4)):
            state, version = changed(weights, 1e-3 * (number + 1)), f"step-{number}"
            update = pool.submit(client.weights.update, state, version=version, verify=False)
            time.sleep(choice.random() / 2)
            worker = server.children()["worker"]
            worker.kill()
            done = update.exception(120) is None
            server.wait_for(lambda old=worker: server.children().get("worker", old).pid != old.pid or None, 60)
            server.wait_ready()
            serves = client.weights.version()
            assert serves == version if done else serves in (last, version)
            digest = client.weights.checksum(["transformer"])["transformer"]
            assert digests.setdefault(serves, digest) == digest
            last = serves
        assert len({*digests.values()}) == len(digests), "each version has weights of its own"


def test_two_trainers_at_once_never_mix_their_weights(server: LiveServer, weights: Tensors) -> None:
    rounds = scaled(100, 4)
    with Client(server.url) as client, ThreadPoolExecutor(2) as pool:
        states = {name: changed(weights, by) for name, by in (("a", 1e-3), ("b", -1e-3))}
        digests = {}
        for name, state in states.items():
            client.weights.update(state, version=f"{name}-first")
            digests[name] = client.weights.checksum(["transformer"])["transformer"]
        assert digests["a"] != digests["b"]

        def train(name: str) -> None:
            with Client(server.url) as own:
                for number in range(rounds):
                    own.weights.update(states[name], version=f"{name}-{number}", bucket_bytes=2**20, verify=False)

        training = [pool.submit(train, name) for name in states]
        seen = set()
        while not all(one.done() for one in training):
            seen.add(client.weights.checksum(["transformer"])["transformer"])
        for one in training:
            one.result()
        assert seen <= {*digests.values()}
        last = client.weights.version().partition("-")[0]
        assert client.weights.checksum(["transformer"])["transformer"] == digests[last]


def _answers_while(server: LiveServer, sent: Future[httpx.Response]) -> int:
    """How often ``/health`` was answered until ``sent`` was."""
    answers = 0
    while True:
        assert httpx.get(f"{server.url}/health", timeout=60).status_code == 200
        answers += 1
        if sent.done():
            return answers
