"""The servers that ``peers`` compares: how each is started, asked for a picture, and stopped with all its processes."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import psutil

from safelight.benchmarks.serving import free_port

SIDE, STEPS = 128, 8
START_S = 120.0
STARTS = 3
"""A server that hangs while it starts, as SGLang does now and then, is started again."""

Ask = Callable[[int], dict[str, Any]]


@dataclass(frozen=True)
class Server:
    """How to start a server on ``port``, and the request for a picture.

    It is ready ``start_s`` after its start at the latest, and then draws for ``warm_s`` before it is measured.
    """

    command: list[str]
    environment: dict[str, str]
    port: int
    path: str
    ask: Ask
    start_s: float = START_S
    warm_s: float = 0.0


def safelight(model: Path, threads: int, environment: dict[str, str]) -> Server:
    port = free_port()
    options = ["--port", str(port), "--dtype", "bfloat16", "--threads", str(threads), "--log-level", "warning"]
    command = [sys.executable, "-m", "safelight.server", str(model), *options]
    return Server(command, environment, port, "/generate", lambda n: _body(n) | {"width": SIDE, "height": SIDE})


def safelight_compiled(model: Path, threads: int, environment: dict[str, str], rows: Sequence[int]) -> Server:
    """Its denoiser compiled for ``rows`` before it is ready, from what earlier starts have compiled.

    CPU threads, which sleep while something is compiled, spin again after some seconds of calm (decision 0006).
    """
    sizes = ",".join(f"{SIDE}x{SIDE}x{number}" for number in rows)
    compiled = {"SAFELIGHT_COMPILE": "on", "SAFELIGHT_COMPILE_SIZES": sizes, **compiler_cache(model)}
    return replace(safelight(model, threads, environment | compiled), start_s=600.0, warm_s=15.0)


def compiler_cache(model: Path) -> dict[str, str]:
    return {"TORCHINDUCTOR_CACHE_DIR": str(model.parent / "inductor")}


def locked(model: Path, threads: int) -> Server:
    port = free_port()
    values = [str(model), "bfloat16", str(port), str(SIDE), "512", str(threads), "one-thread"]
    command = [sys.executable, "-m", "safelight.benchmarks.locked_app", *values]
    return Server(command, {}, port, "/generate", _body)


def sglang(model: Path, folders: list[str], *, batching: bool) -> Server:
    port = free_port()
    model = _for_sglang(model)
    program = ["-m", "sglang.multimodal_gen.runtime.entrypoints.cli.main", "serve", "--backend", "sglang"]
    options = ["--model-path", str(model), "--host", "127.0.0.1", "--port", str(port), "--warmup-mode", "off"]
    batches = ["--batching-max-size", "16", "--batching-delay-ms", "50"] if batching else []
    environment = {"PYTHONPATH": os.pathsep.join(folders), "HF_HUB_OFFLINE": "1"}
    size = {"size": f"{SIDE}x{SIDE}", "n": 1, "response_format": "b64_json"}
    command = [sys.executable, *program, *options, *batches]
    return Server(command, environment, port, "/v1/images/generations", lambda n: _body(n) | size)


def _for_sglang(model: Path) -> Path:
    """A copy of the model that SGLang's own transformer loads: it names two numbers otherwise than diffusers."""
    copy = model.parent / "for-sglang" / "Z-Image-Turbo"  # it knows the architecture by this name
    shutil.copytree(model, copy, dirs_exist_ok=True)
    path = copy / "transformer" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"num_attention_heads": config["n_heads"], "num_layers": config["n_layers"]}))
    return copy


def _body(number: int) -> dict[str, Any]:
    return {"prompt": prompt(number), "seed": number, "num_inference_steps": STEPS, "guidance_scale": 0.0}


def prompt(number: int) -> str:
    """A prompt of its own for each picture, so that no cache of prompts takes part."""
    return f"a cat number {number}"


@contextmanager
def running(server: Server) -> Iterator[psutil.Process]:
    """Run ``server`` until it answers, and stop it with all its processes. Raises ``TimeoutError`` if it never does."""
    with tempfile.TemporaryFile() as log:
        for _ in range(STARTS):
            process = _start(server, log)
            try:
                if _answers(server, process, log):
                    _warm_up(server)
                    yield psutil.Process(process.pid)
                    return
            finally:
                _stop(process)
            print(f"{server.path} on port {server.port} has not drawn a picture in {server.start_s} s", flush=True)
    raise TimeoutError(f"{server.command} was started {STARTS} times and has not drawn a picture in {server.start_s} s")


def _start(server: Server, log: IO[bytes]) -> subprocess.Popen[bytes]:
    environment = os.environ | server.environment
    return subprocess.Popen(server.command, env=environment, stdout=log, stderr=log, start_new_session=True)


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    root = psutil.Process(process.pid)
    family = [*root.children(recursive=True), root]
    process.send_signal(signal.SIGTERM)
    _, left = psutil.wait_procs(family, timeout=30)
    for one in left:
        one.kill()
    process.wait()


def _answers(server: Server, process: subprocess.Popen[bytes], log: IO[bytes]) -> bool:
    """Return whether the server draws a picture in time. Raises ``RuntimeError`` if its process ends before."""
    deadline = time.monotonic() + server.start_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            log.seek(0)
            raise RuntimeError(f"{server.command} ended with {process.returncode}: {log.read()[-2000:].decode()}")
        try:
            draw(server, 0)
        except (OSError, http.client.HTTPException):
            time.sleep(0.5)
        else:
            return True
    return False


def _warm_up(server: Server) -> None:
    until = time.monotonic() + server.warm_s
    while time.monotonic() < until:
        draw(server, 0)


def draw(server: Server, number: int) -> float:
    """Seconds until a picture arrived. Raises ``HTTPException`` if the server answers with an error."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=START_S)
    began = time.perf_counter()
    connection.request("POST", server.path, json.dumps(server.ask(number)), {"Content-Type": "application/json"})
    reply = connection.getresponse()
    content = reply.read()
    connection.close()
    if reply.status != 200:
        raise http.client.HTTPException(f"{reply.status}: {content[:200]!r}")
    return time.perf_counter() - began
