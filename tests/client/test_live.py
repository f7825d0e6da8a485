"""Both clients and the command line against the real server, on a tiny FLUX."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image
from safetensors.torch import load

from safelight.client import AsyncClient, Client, Encoding, InvalidRequest, Preview, Progress, Queued, Result
from safelight.tests.forked import run
from safelight.tests.live import LiveServer
from safelight.tests.tiny import save

SIDE = 64
STEPS = 20
SAFELIGHT = [sys.executable, "-P", "-c", "from safelight.client.cli import main; main()"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("flux", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[LiveServer]:
    with LiveServer(model, ["--threads", "1"]) as server:
        yield server.wait_ready()


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[Client]:
    with Client(server.url) as client:
        yield client


def test_both_clients_get_the_same_picture(client: Client) -> None:
    async def draw() -> bytes:
        async with AsyncClient(client.base_url) as other:
            made = await other.generate("a", seed=7, deterministic=True, width=SIDE, height=SIDE, steps=4)
            return made.outputs[0].data

    result = client.generate("a", seed=7, deterministic=True, width=SIDE, height=SIDE, steps=4)
    assert (result.outputs[0].seed, result.steps) == (7, 4)
    assert result.image.size == (SIDE, SIDE)
    assert result.outputs[0].data == asyncio.run(draw())


def test_both_clients_get_the_embeddings_of_the_pipeline_s_own_method(client: Client, model: Path) -> None:
    async def encode() -> Encoding:
        async with AsyncClient(client.base_url) as other:
            return await other.encode("a", returns="cache", max_sequence_length=64)

    (made,) = client.encode("a", deterministic=True, max_sequence_length=64).outputs
    plain: Any = FluxPipeline.from_pretrained(model)
    with torch.no_grad():
        expected = plain.encode_prompt("a", None, max_sequence_length=64)
    assert made.data is not None
    found = load(made.data)
    for name, wanted in zip(("prompt_embeds", "pooled_prompt_embeds", "text_ids"), expected, strict=True):
        assert made.tensors[name].shape == wanted.shape
        assert torch.allclose(found[name], wanted, atol=1e-6)
    assert asyncio.run(encode()).outputs[0].data is None


def test_a_stream_tells_every_step_and_shows_previews(client: Client) -> None:
    events = list(client.stream("a", n=2, preview_every=2, width=SIDE, height=SIDE, steps=STEPS))
    assert isinstance(events[0], Queued)
    for output in (0, 1):
        steps = [event.step for event in events if isinstance(event, Progress) and event.output == output]
        assert steps == list(range(1, STEPS + 1))
    previews = [event for event in events if isinstance(event, Preview)]
    assert previews, "a preview may come too late to be of use, but not every one"
    assert previews[0].image.size == (SIDE, SIDE)
    assert isinstance(events[-1], Result)
    assert len(events[-1].generation.outputs) == 2


def test_a_mistake_comes_back_as_its_exception(client: Client) -> None:
    with pytest.raises(InvalidRequest, match=r"\(request ") as raised:
        client.generate("a", width=-8)
    assert raised.value.field == "width"
    with pytest.raises(InvalidRequest, match="sharpness"):
        client.generate("a", sharpness=3)


def test_a_cancelled_call_stops_the_work(client: Client) -> None:
    async def cancel() -> None:
        async with AsyncClient(client.base_url) as other:
            task = asyncio.create_task(other.generate("a", steps=1000, width=SIDE, height=SIDE))
            await asyncio.sleep(1)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    before = cancelled(client)
    asyncio.run(cancel())
    deadline = time.monotonic() + 20
    while cancelled(client) == before:
        assert time.monotonic() < deadline, "the server goes on with work that nobody waits for"
        time.sleep(0.1)


def cancelled(client: Client) -> int:
    count: int = client.info()["replicas"][0]["stats"]["cancelled"]
    return count


def test_info_reads_what_the_server_really_says(client: Client) -> None:
    reported = run("safelight.client.cli:main", ["info", "--url", client.base_url])
    assert reported.returncode == 0, reported.stderr
    assert "FluxPipeline" in reported.stdout
    assert client.model_info()["pipeline"] == "FluxPipeline"


@pytest.fixture
def nothing_at_the_default_address() -> None:
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", 30000)) == 0:
            pytest.skip("something answers at 127.0.0.1:30000, and `safelight generate` would ask that")


@pytest.mark.usefixtures("nothing_at_the_default_address")
def test_generate_needs_no_server(model: Path, tmp_path: Path) -> None:
    size = ("--width", "64", "--height", "64", "--steps", "2")
    command = [*SAFELIGHT, "generate", "a", "-o", "out.webp", "--seed", "7", "--model", str(model), *size]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path, env=_environment())
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("out.webp  64x64  seed 7  ")
    with Image.open(tmp_path / "out.webp") as image:
        assert (image.format, image.size) == ("WEBP", (64, 64))


@pytest.mark.usefixtures("nothing_at_the_default_address")
def test_ctrl_c_ends_the_command_and_its_server(model: Path, tmp_path: Path) -> None:
    command = [*SAFELIGHT, "generate", "a", "--model", str(model), "--steps", "1000"]
    process = subprocess.Popen(command, cwd=tmp_path, env=_environment(), stderr=subprocess.PIPE, text=True)
    started: list[psutil.Process] = []
    deadline = time.monotonic() + 60
    while len(started) < 3:  # server, scheduler, worker
        assert time.monotonic() < deadline
        time.sleep(0.1)
        started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert not [child for child in started if child.is_running()]


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SAFELIGHT_")}
    return {**kept, "SAFELIGHT_THREADS": "1"}
