"""A whole server with two replicas of two ranks, each rank on its own GPU: draws, digests, sleep and wake."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from safelight.client import Client
from safelight.client.checksum import checksum
from safelight.tests.effort import NIGHTLY
from safelight.tests.live import LiveServer
from safelight.tests.system.asking import ask, body, picture

from .device import PLAYED, TYPE, device, of_programs
from .replica import Replica, plain_pipeline

CLOSE = 1e-4 if PLAYED else 5e-3
"""The change by dividing layers among ranks."""

pytestmark = [
    pytest.mark.skipif(PLAYED and not NIGHTLY, reason="it starts five processes that import torch"),
    pytest.mark.skipif(TYPE != "cuda" or torch.cuda.device_count() < 4, reason="it needs four GPUs"),
]


def test_replicas_of_several_ranks_serve_sleep_and_wake_on_their_gpus(checkpoint: Callable[[str], Path]) -> None:
    path = checkpoint("flux")
    asked = body("flux", deterministic=True)
    replica = Replica(path, device())
    expected = replica.plain(replica.request(0), plain_pipeline(path, device()))
    replica.close()
    flags = ["--device", TYPE, "--dtype", "float32", "--replicas", "2", "--tp", "2", "--threads", "1"]
    with LiveServer(path, flags, program=True, environment=of_programs()) as server, Client(server.url) as client:
        server.wait_ready(300)
        server.wait_for(lambda: ready(client), 300)
        assert {model["device"] for model in client.info()["models"]} <= {"cuda:0", "cuda:2"}
        drawn = [picture(ask(server.url, asked)) for _ in range(2)]
        assert torch.equal(*drawn)
        assert (drawn[0] - expected).abs().max() <= CLOSE
        files = {name: module.sha256 for name, module in checksum(path).items()}
        assert client.weights.checksum() == files
        client.sleep()
        client.wake()
        assert torch.equal(picture(ask(server.url, asked)), drawn[0])


def ready(client: Client) -> bool | None:
    """True once both replicas are ready, for :meth:`LiveServer.wait_for`."""
    return [one["state"] for one in client.info()["replicas"]] == ["ready", "ready"] or None
