"""The command line, run as a program."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from safelight import __version__
from safelight.tests.forked import run

from .played_server import PlayedServer, Reply, error_reply, event, event_reply, generation, json_reply

HEALTHY = json_reply({"status": "ok"})
MODEL = {"model": "shapes", "path": "/models/shapes"}
INFO = {
    "version": "0.1.0",
    "uptime_s": 12.0,
    "models": [
        {
            **MODEL,
            "pipeline": "FluxPipeline",
            "device": "cpu",
            "dtype": "float32",
            "parameters": {"transformer": 5_000_000},
            "default_width": 64,
            "default_height": 64,
            "weight_version": "initial",
        }
    ],
    "batching": {"mode": "merged", "reason": "apart and together gave the same"},
    "queued": 1,
    "running": 2,
    "adapters": {
        "transformer": [{"nickname": "style", "path": "/s", "merged": True, "mode": "merge", "strength": 0.5}]
    },
    "replicas": [
        {
            "replica": 0,
            "state": "ready",
            "message": "",
            "outstanding": 3,
            "stats": {"outputs": 9, "forwards": 10, "calls": 25},
        }
    ],
}


Run = subprocess.CompletedProcess[str]


def safelight(*arguments: str | Path, folder: Path | None = None, **environment: str) -> Run:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SAFELIGHT_")}
    return run("safelight.__main__:main", arguments, cwd=folder, env={**kept, "COLUMNS": "200", **environment})


def drawn(*seeds: int, **changes: Any) -> Reply:
    steps = [event("progress", {"output": 0, "step": step, "steps": 2}) for step in (1, 2)]
    return event_reply(event("queued", {"position": 0}), *steps, event("result", {**generation(*seeds), **changes}))


def test_help_comes_without_the_heavy_libraries() -> None:
    program = (
        "import sys\nfrom safelight.client.cli import main\n"
        "try: main()\nexcept SystemExit: print(sorted(set(sys.modules) & {'torch', 'diffusers', 'numpy', 'PIL'}))"
    )
    run = subprocess.run([sys.executable, "-c", program, "--help"], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"
    assert all(command in run.stdout for command in ("serve", "verify", "generate", "info", "push", "checksum", "diff"))


def test_the_version_is_printed() -> None:
    assert safelight("--version").stdout == f"safelight {__version__}\n"


def test_serve_becomes_the_server_with_every_argument() -> None:
    run = safelight("serve", "--help")
    assert run.returncode == 0
    assert "--max-batch" in run.stdout
    assert "--grace-s" in run.stdout


def test_a_server_does_not_wait_for_the_clients_imports() -> None:
    """``execv`` is replaced, because the imports of this process would be gone after it."""
    program = (
        "import os, sys\nfrom safelight.__main__ import main\nos.execv = lambda *_: sys.exit(0)\n"
        "try: main()\nexcept SystemExit: print(sorted(set(sys.modules) & {'typer', 'httpx', 'msgspec', 'asyncio'}))"
    )
    run = subprocess.run([sys.executable, "-c", program, "serve"], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def test_the_exit_status_of_serve_is_the_servers(tmp_path: Path) -> None:
    run = safelight("serve", tmp_path / "nothing", "--port", "0")
    assert run.returncode == 2
    assert "nothing" in run.stderr
    assert "Traceback" not in run.stderr


def test_a_stray_module_in_the_folder_does_not_break_the_server(tmp_path: Path) -> None:
    (tmp_path / "msgspec.py").write_text("raise RuntimeError('the wrong module')")
    assert safelight("serve", "--help", folder=tmp_path).returncode == 0


def test_generate_saves_the_picture_and_tells_where(tmp_path: Path) -> None:
    with PlayedServer(HEALTHY, HEALTHY, drawn(7)) as server:
        path = tmp_path / "new" / "out.png"
        run = safelight("generate", "a red circle", "-o", path, "--url", server.url, "--seed", "7", "--steps", "2")
    assert run.returncode == 0, run.stderr
    assert run.stdout == f"{path}  8x8  seed 7  0.40 s\n"
    assert run.stderr == ""
    with Image.open(path) as image:
        assert image.size == (8, 8)
    assert server.requests[-1].body == {
        "prompt": "a red circle",
        "num_inference_steps": 2,
        "seed": 7,
        "n": 1,
        "output_format": "png",
        "deterministic": False,
        "priority": 0,
        "stream": True,
    }


def test_what_a_request_can_ask_for_can_be_asked_for_on_the_command_line(tmp_path: Path) -> None:
    flags = ["--seed", "7", "--seed", "9", "--lora", "ink=0.5", "--lora", "a/b", "--priority", "3", "--timeout-s", "60"]
    with PlayedServer(HEALTHY, HEALTHY, drawn(7, 9)) as server:
        run = safelight(
            "generate", "a", "b", *flags, "--cache", "0.1", "--preview-every", "3", "--url", server.url, folder=tmp_path
        )
    assert run.returncode == 0, run.stderr
    assert server.requests[-1].body == {
        "prompt": ["a", "b"],
        "seed": [7, 9],
        "n": 1,
        "lora": [{"name": "ink", "scale": 0.5}, {"name": "a/b"}],
        "priority": 3,
        "timeout_s": 60.0,
        "cache": "0.1",
        "preview_every": 3,
        "deterministic": False,
        "stream": True,
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out-0.png", "out-1.png"]


def test_a_scale_that_is_not_a_number_is_refused(tmp_path: Path) -> None:
    run = safelight("generate", "a", "--lora", "ink=much", folder=tmp_path)
    assert run.returncode == 1
    assert "NAME=SCALE" in run.stderr


def test_several_outputs_are_numbered(tmp_path: Path) -> None:
    with PlayedServer(HEALTHY, HEALTHY, drawn(7, 8)) as server:
        run = safelight("generate", "a", "-o", tmp_path / "out.jpg", "-n", "2", "--url", server.url)
    assert run.returncode == 0, run.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out-0.jpg", "out-1.jpg"]


def test_a_name_without_a_suffix_gets_the_one_of_what_was_made(tmp_path: Path) -> None:
    with PlayedServer(HEALTHY, HEALTHY, drawn()) as server:
        safelight("generate", "a", "--url", server.url, folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]
    assert "output_format" not in server.requests[-1].body


def test_a_suffix_that_nothing_writes_is_refused_before_anything_is_drawn(tmp_path: Path) -> None:
    with PlayedServer(HEALTHY) as server:
        run = safelight("generate", "a", "-o", tmp_path / "out.gif", "--url", server.url)
    assert run.returncode == 1
    assert ".png" in run.stderr
    assert server.requests == []


def test_pipeline_arguments_are_json_or_words(tmp_path: Path) -> None:
    extra = ("--extra", "eta=0.5", "--extra", "mode=fast")
    with PlayedServer(HEALTHY, HEALTHY, drawn()) as server:
        safelight("generate", "a", "--url", server.url, *extra, folder=tmp_path)
    assert server.requests[-1].body["extra"] == {"eta": 0.5, "mode": "fast"}


def test_an_error_of_the_server_is_one_sentence(tmp_path: Path) -> None:
    with PlayedServer(HEALTHY, HEALTHY, error_reply(400, "invalid_request", "width must be less.")) as server:
        run = safelight("generate", "a", "--url", server.url, folder=tmp_path)
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr == "width must be less. (request r1)\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["flag", "environment"])
def test_a_named_server_that_is_not_there_is_not_replaced_by_another(place: str, tmp_path: Path) -> None:
    with PlayedServer(HEALTHY) as server:
        url = server.url
    if place == "flag":
        run = safelight("generate", "a", "--url", url, folder=tmp_path)
    else:
        run = safelight("generate", "a", folder=tmp_path, SAFELIGHT_URL=url)
    assert run.returncode == 1
    assert run.stderr == f"Nothing answers at {url}: start a server with `safelight serve`.\n"


def test_a_server_of_another_model_is_not_used(tmp_path: Path) -> None:
    with PlayedServer(HEALTHY, HEALTHY, json_reply(MODEL)) as server:
        run = safelight("generate", "a", "--model", "other", "--url", server.url, folder=tmp_path)
    assert run.returncode == 1
    assert "serves shapes, not other" in run.stderr


def test_the_same_model_by_its_path_is_used(tmp_path: Path) -> None:
    with PlayedServer(HEALTHY, HEALTHY, json_reply(MODEL), drawn()) as server:
        run = safelight("generate", "a", "--model", "/models/shapes", "--url", server.url, folder=tmp_path)
    assert run.returncode == 0, run.stderr


def test_the_key_comes_from_the_environment(tmp_path: Path) -> None:
    with PlayedServer(json_reply(INFO)) as server:
        safelight("info", "--url", server.url, SAFELIGHT_API_KEY="k")
    assert server.requests[0].headers["authorization"] == "Bearer k"


def test_info_shows_model_replicas_batching_and_queue() -> None:
    with PlayedServer(json_reply(INFO)) as server:
        text = safelight("info", "--url", server.url).stdout
    for reported in (
        server.url, "FluxPipeline, 5.0 M parameters", "merged: apart and together", "1 waiting, 2 running",
        "2.5 calls a forward", "transformer: style (merged, strength 0.5)",
    ):  # fmt: skip
        assert reported in text


def test_info_is_json_for_programs() -> None:
    with PlayedServer(json_reply(INFO)) as server:
        assert json.loads(safelight("info", "--json", "--url", server.url).stdout) == INFO


def test_info_works_while_the_server_still_loads() -> None:
    loading = {"replica": 0, "state": "starting", "message": "loading", "outstanding": 0}
    stats = {"outputs": 0, "forwards": 0, "calls": 0}
    body = {**INFO, "models": [], "batching": None, "replicas": [{**loading, "stats": stats}]}
    with PlayedServer(json_reply(body)) as server:
        run = safelight("info", "--url", server.url)
    assert run.returncode == 0, run.stderr
    assert "starting" in run.stdout
