"""Adapters that trainers send as tensors: merged, listed, and taken out like any other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save, save_file

from safelight.client import Client, InvalidRequest
from safelight.client.weight_routes import RouteName
from safelight.tests.updates.trainer import SAFETENSORS, Trainer
from safelight.tests.worker.weights import trainer as sending

from .conftest import Adapters, Serve, listed
from .test_life import is_drawn

ROUTE = "/update_weights_from_tensor"


@pytest.fixture(scope="module")
def sender() -> Iterator[sending.Trainer]:
    with sending.Trainer() as started:
        yield started


def file_of(adapters: Adapters, nickname: str) -> Path:
    return adapters.folder / nickname / "adapter_model.safetensors"


def send(server: Trainer, adapters: Adapters, nickname: str, **parameters: Any) -> dict[str, Any]:
    content = save(load_file(file_of(adapters, nickname)))
    given = {"weight_update_mode": "lora_merge", **parameters}
    answer = server.post(ROUTE, content=content, headers=SAFETENSORS, params=given)
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


def test_an_adapter_is_merged_published_listed_replaced_and_taken_out(server: Trainer, adapters: Adapters) -> None:
    base, plain = server.checksum(), server.picture()
    told = send(server, adapters, "first", lora_alpha=2.0, lora_rank=4, weight_version="step-1")
    assert (told["success"], told["weight_version"]) == (True, "step-1")
    assert told["updated"]["transformer"] == told["applied"] > 0
    assert is_drawn(server, adapters, ("first", 1.0))
    assert server.draw()["weight_version"] == "step-1"
    assert server.checksum() == base
    (loaded,) = listed(server)["loaded_adapters"]
    assert (loaded["nickname"], loaded["path"], loaded["rank"], loaded["alpha"]) == (
        "lora_merge:transformer",
        None,
        4,
        2.0,
    )
    assert listed(server)["active"]["transformer"][0]["merged"]
    again = send(server, adapters, "second", lora_alpha=24.5)
    assert again["weight_version"] not in ("step-1", None)
    assert is_drawn(server, adapters, ("second", 1.0))
    server.done("/v1/unmerge_lora_weights", {})
    assert server.picture() == plain
    assert server.checksum() == base


@pytest.mark.parametrize("form", ["pairs", "elements"])
def test_the_dialect_and_shared_memory(form: str, sender: sending.Trainer, server: Trainer, adapters: Adapters) -> None:
    base, before = server.checksum(), sender.segments()
    payload = sender.checkpoint(file_of(adapters, "first"), form, by=0.0)
    load_format = None if form == "pairs" else "flattened_bucket"
    body = {"weight_update_mode": "lora_merge", "lora_alpha": 2.0}
    server.done(ROUTE, {"serialized_named_tensors": [payload], "load_format": load_format, **body})
    assert sender.segments() == before
    assert is_drawn(server, adapters, ("first", 1.0))
    shared = server.shared() / "sent.safetensors"
    save_file(load_file(file_of(adapters, "third")), shared)
    server.done(ROUTE, {"shared": {"path": str(shared)}, "weight_update_mode": "lora_merge", "lora_alpha": 1.0})
    shared.unlink()
    assert is_drawn(server, adapters, ("third", 1.0))
    assert server.checksum() == base


@pytest.mark.parametrize("route", ["shared", "http"])
def test_the_client_sends_them(route: RouteName, server: Trainer, adapters: Adapters) -> None:
    base, tensors = server.checksum(), load_file(file_of(adapters, "first"))
    with Client(server.server.url) as client:
        done = client.weights.update_lora(tensors, alpha=2.0, rank=4, version=f"by {route}", route=route)
        assert done is not None
        assert done.weight_version == client.weights.version() == f"by {route}"
        assert is_drawn(server, adapters, ("first", 1.0))
        half = {name: tensor for name, tensor in tensors.items() if "lora_A" in name}
        with pytest.raises(InvalidRequest, match="no counterpart"):
            client.weights.update_lora(half, route=route)
        assert is_drawn(server, adapters, ("first", 1.0))
        assert client.weights.version() == f"by {route}"
    assert server.checksum() == base


def test_what_cannot_be_merged_changes_nothing(server: Trainer, adapters: Adapters) -> None:
    before, version = server.picture(), server.draw()["weight_version"]
    content = save(load_file(file_of(adapters, "first")))

    def refused(body: bytes, **parameters: Any) -> str:
        given = {"weight_update_mode": "lora_merge", **parameters}
        answer = server.post(ROUTE, content=body, headers=SAFETENSORS, params=given)
        assert answer.status_code == 400, answer.text
        message: str = answer.json()["message"]
        return message

    assert "has rank 4, and not 5" in refused(content, lora_rank=5)
    tensors = load_file(file_of(adapters, "first"))
    half = {name: tensor for name, tensor in tensors.items() if "lora_A" in name}
    assert "no counterpart" in refused(save(half))
    first = next(name for name in tensors if "lora_B" in name)
    assert "no numbers" in refused(save(tensors | {first: tensors[first] * float("nan")}))
    assert "transformer_2" in refused(content, target_module="transformer_2")
    assert (server.picture(), server.draw()["weight_version"]) == (before, version)
    assert listed(server) == {"loaded_adapters": [], "active": {}}
    assert list(server.shared().glob("adapter-*")) == []


def test_a_replica_that_comes_back_has_what_was_sent(serve: Serve, adapters: Adapters) -> None:
    with serve("--replicas", "2") as server:
        send(server, adapters, "first", lora_alpha=2.0, weight_version="sent")
        for number in (0, 1):
            server.rank_processes(number)[0].kill()
            server.wait_lost(number)
            server.wait_all_ready()
        drawn = [server.draw()["weight_version"] for _ in range(4)]
        assert set(drawn) == {"sent"}
        assert all(is_drawn(server, adapters, ("first", 1.0)) for _ in range(4))
