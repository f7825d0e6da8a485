"""Hours of a trainer's and of users' work, in short: no process of the server grows, and nothing is left behind."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safelight.client import Client
from safelight.formats.model_names import EMBEDDED_ADAPTERS, embedded_adapter
from safelight.protocol.adapters import WantedMode
from safelight.tests.effort import scaled
from safelight.tests.live import LiveServer
from safelight.tests.updates.trainer import Tensors, changed

from .memory import check_flat, held

ROUNDS = scaled(300, 9)
GENERATIONS = 10
"""Requests per round, along with one update and one change of adapters."""

MODES: tuple[WantedMode, ...] = ("merge", "dynamic", "request", "auto")


def test_no_process_grows_over_thousands_of_pictures_updates_and_changes_of_adapters(
    server: LiveServer, weights: Tensors
) -> None:
    samples = []
    with Client(server.url) as client, ThreadPoolExecutor(4) as pool:
        shared = Path(client.info()["shared_memory"])
        files = sorted(shared.iterdir())
        for number in range(ROUNDS):
            drawing = [pool.submit(_draw, client, number * GENERATIONS + index) for index in range(GENERATIONS)]
            client.weights.update(changed(weights, 1e-4 * (number % 2)), version=f"step-{number}")
            name = EMBEDDED_ADAPTERS[number % len(EMBEDDED_ADAPTERS)]
            client.set_lora(name, embedded_adapter(name), strength=0.5, mode=MODES[number % len(MODES)])
            for one in drawing:
                one.result()
            client.unload_lora(name)
            samples.append(held(server))
            assert client.weights.version() == f"step-{number}"
        assert sorted(shared.iterdir()) == files
    check_flat(samples)


def _draw(client: Client, seed: int) -> None:
    generation = client.generate("a large red circle", seed=seed, steps=1 + seed % 3, width=64, height=64)
    assert len(generation.outputs) == 1
