"""The example trains a live server: pushes change its pictures, versions march on, runs stop and go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from safelight.client import Client
from safelight.examples.flow_grpo.policy import Policy
from safelight.tests.effort import NIGHTLY
from safelight.tests.forked import Forked, run
from safelight.tests.live import LiveServer

SMALL = "--prompts 2 --group 4 --examined 4 --examine-every 1 --steps 4 --noisy 2 --noisy-among 3"
EXAMPLE = "safelight.examples.flow_grpo.__main__:main"
PROMPT = "a large red circle in the center on a white background"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with LiveServer("shapes", ["--dtype", "float32", "--threads", "2", "--max-outputs", "200"]) as server:
        server.wait_ready()
        yield server.url


def train(out: Path, *options: str) -> list[dict[str, Any]]:
    """The log's lines, after a run of the example; forked where it can be, as no forked program finds peft."""
    arguments = [*SMALL.split(), "--out", str(out), *options]
    if "--lora" in options:
        subprocess.run([sys.executable, "-P", "-m", "safelight.examples.flow_grpo", *arguments], check=True)
    else:
        run(EXAMPLE, arguments, timeout=900).check_returncode()
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def drawn(client: Client) -> NDArray[np.uint8]:
    return np.asarray(client.generate(PROMPT, seed=3, steps=4).outputs[0].image)


def test_pushes_change_the_pictures_and_versions_march_on(url: str, tmp_path: Path) -> None:
    """And what serves at the end is what was learned."""
    with Client(url) as client:
        pictures = [drawn(client)]
        log = train(tmp_path, "--server", url, "--iterations", "2", "--lr", "1e-3")
        pictures.append(drawn(client))
        assert [line.get("drawn_with") for line in log] == [None, ["start"], ["step-1"]]
        assert client.weights.version() == log[-1]["pushed"] == "step-2"

        log = train(tmp_path, "--server", url, "--iterations", "4", "--lr", "1e-3")
        pictures.append(drawn(client))
        assert [line.get("drawn_with") for line in log[3:]] == [["step-2"], ["step-3"]]
        assert [line["iteration"] for line in log] == [0, 1, 2, 3, 4]
        assert client.weights.version() == "step-4"
        assert not np.array_equal(pictures[0], pictures[1])
        assert not np.array_equal(pictures[1], pictures[2])

        learned = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["learned"]
        held = client.weights.checksum(["transformer"], detail=True)["transformer"].tensors
        names = [name for name, _ in Policy(None).transformer.named_parameters()]
        assert set(names) == set(held)
        client.weights.verify(dict(zip(names, learned, strict=True)))
    for line in log[1:]:
        assert line["first_ratio_off"] < 1e-5, "the server's log-probabilities are the trainer's own"
        assert 0 <= line["held_out"] <= 1
        assert line["grad_norm"] > 0
    assert len({line["held_out_reward"] for line in log}) == len(log), "each push changes what is drawn"
    with Image.open(tmp_path / "curve.png") as curve:
        assert curve.format == "PNG"


@pytest.mark.skipif(not NIGHTLY, reason="trains for a minute; the nightly set has it")
def test_an_adapter_is_learned_instead(url: str, tmp_path: Path) -> None:
    with Client(url) as client:
        log = train(tmp_path, "--server", url, "--iterations", "2", "--lora", "4", "--lr", "1e-3")
        assert [line.get("drawn_with") for line in log] == [None, ["start"], ["step-1"]]
        assert log[2]["first_ratio_off"] < 1e-5, "the merged adapter draws as the trainer's own does"
        assert [lora.nickname for lora in client.loras().loaded] == ["lora_merge:transformer"]

        log = train(tmp_path / "whole", "--server", url, "--iterations", "1", "--lr", "1e-3")
        assert client.loras().loaded == (), "what was merged before would be in what is drawn"
        assert log[1]["first_ratio_off"] < 1e-5
    other = run(EXAMPLE, [*SMALL.split(), "--out", tmp_path, "--server", url])
    assert other.returncode == 1
    assert "is of a run with --lora 4" in other.stderr


@pytest.mark.skipif(not NIGHTLY, reason="trains for a minute; the nightly set has it")
def test_it_is_stopped_by_ctrl_c_and_goes_on_from_there(tmp_path: Path) -> None:
    """Here it starts a server of its own, which ends with it."""
    trainer = Forked(EXAMPLE, [*SMALL.split(), "--out", tmp_path], stdout=subprocess.PIPE)
    while not (tmp_path / "checkpoint.pt").exists():
        assert trainer.poll() is None, "it ended by itself"
        time.sleep(0.1)
    trainer.send_signal(signal.SIGINT)
    rest, _ = trainer.communicate()
    assert trainer.returncode == 130
    assert "goes on from the last iteration" in rest
    done = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["iteration"]
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write(json.dumps({"iteration": done + 1}) + "\n")  # as if stopped between this line and the checkpoint
    log = train(tmp_path, "--iterations", str(done + 1))
    assert [line["iteration"] for line in log] == list(range(done + 2))
    assert log[-1]["drawn_with"] == [f"step-{done}"]


def test_the_trainer_s_threads_do_not_spin_on_the_cores_that_it_shares_with_the_server() -> None:
    code = "import os, sys, safelight.examples.flow_grpo; print('torch' in sys.modules, os.environ['GOMP_SPINCOUNT'])"
    clean = {name: value for name, value in os.environ.items() if "OMP" not in name}
    for chosen, spins in (({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7")):
        reported = subprocess.run([sys.executable, "-c", code], env=clean | chosen, capture_output=True, text=True)
        assert reported.stdout.split() == ["False", spins], reported.stderr
