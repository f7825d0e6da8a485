"""Adapters that trainers send as tensors: merged, listed, and taken out like any other."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save, save_file

from safelight.client import Client, InvalidRequest
from safelight.client.transports import TransportName
from safelight.tests.updates.test_groups import free_port
from safelight.tests.updates.trainer import SAFETENSORS, Trainer
from safelight.tests.updates.training import init_custom_process_group
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
    given = {"weight_update_mode": "lora_merge", "lora_complete": "true", **parameters}
    answer = server.post(ROUTE, content=content, headers=SAFETENSORS, params=given)
    assert answer.status_code == 200, answer.text
    reported: dict[str, Any] = answer.json()
    return reported


def test_an_adapter_is_merged_published_listed_replaced_and_taken_out(server: Trainer, adapters: Adapters) -> None:
    base, plain = server.checksum(), server.picture()
    reported = send(server, adapters, "first", lora_alpha=2.0, lora_rank=4, weight_version="step-1")
    assert (reported["success"], reported["weight_version"]) == (True, "step-1")
    assert reported["updated"]["transformer"] == reported["applied"] > 0
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
    body = {"weight_update_mode": "lora_merge", "lora_alpha": 2.0, "lora_complete": True}
    server.done(ROUTE, {"serialized_named_tensors": [payload], "load_format": load_format, **body})
    assert sender.segments() == before
    assert is_drawn(server, adapters, ("first", 1.0))
    shared = server.shared() / "sent.safetensors"
    save_file(load_file(file_of(adapters, "third")), shared)
    server.done(ROUTE, {"shared": {"path": str(shared)}, **body, "lora_alpha": 1.0})
    shared.unlink()
    assert is_drawn(server, adapters, ("third", 1.0))
    assert server.checksum() == base


@pytest.mark.parametrize("route", ["shared", "http"])
def test_the_client_sends_them(route: TransportName, server: Trainer, adapters: Adapters) -> None:
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


@pytest.mark.parametrize("bare", [False, True])
def test_buckets_of_one_version_are_one_adapter(bare: bool, server: Trainer, adapters: Adapters) -> None:
    base, tensors = server.checksum(), load_file(file_of(adapters, "first"))
    if bare:
        tensors = {name.removesuffix(".weight"): tensor for name, tensor in tensors.items()}
    parameters = {"weight_update_mode": "lora_merge", "lora_alpha": 2.0, "lora_rank": 4, "weight_version": "in-parts"}
    names = list(tensors)
    for start in range(0, len(names), 15):  # an odd number, which cuts pairs
        content = save({name: tensors[name] for name in names[start : start + 15]})
        answer = server.post(ROUTE, content=content, headers=SAFETENSORS, params=parameters)
        assert answer.status_code == 200, answer.text
    assert answer.json()["waiting"] == []
    assert is_drawn(server, adapters, ("first", 1.0))
    assert server.checksum() == base


def test_the_client_sends_what_is_large_in_buckets_that_are_merged_together(
    server: Trainer, adapters: Adapters
) -> None:
    base, tensors = server.checksum(), load_file(file_of(adapters, "first"))
    send(server, adapters, "second", lora_alpha=24.5)
    with Client(server.server.url) as client:
        done = client.weights.update_lora(tensors, alpha=2.0, rank=4, version="large", bucket_bytes=3000)
        assert done is not None
        assert (done.weight_version, client.weights.version()) == ("large", "large")
        assert is_drawn(server, adapters, ("first", 1.0))
        begun_id = server.done("/begin_weights_update", {})["update_id"]
        kept = server.post(
            ROUTE,
            content=save(load_file(file_of(adapters, "third"))),
            headers=SAFETENSORS,
            params={"weight_update_mode": "lora_merge", "update_id": begun_id},
        )
        assert kept.json()["applied"] > 0
        server.done("/abort_weights_update", {"update_id": begun_id})
        assert is_drawn(server, adapters, ("first", 1.0))
        half = {name: tensor for name, tensor in tensors.items() if "lora_A" in name}
        with pytest.raises(InvalidRequest, match="no counterpart"), client.weights.begin(verify=False) as begun:
            begun.update_lora(half, alpha=2.0)
    assert is_drawn(server, adapters, ("first", 1.0))
    assert server.checksum() == base
    assert len(list(server.shared().glob("adapter-*"))) == 1


def test_an_adapter_comes_over_a_process_group(server: Trainer, adapters: Adapters) -> None:
    tensors = load_file(file_of(adapters, "first"))
    port, members = free_port(), server.ranks * len(server.replicas())
    asked = {"master_address": "127.0.0.1", "master_port": port, "rank_offset": 1, "world_size": members + 1}
    named = {"group_name": f"adapters of {members}"}
    fields = {"weight_update_mode": "lora_merge", "lora_alpha": 2.0, "load_format": None, "weight_version": "received"}

    def announced(names: list[str]) -> dict[str, Any]:
        reported = {"names": names, "shapes": [list(tensors[name].shape) for name in names]}
        return {**reported, "dtypes": [str(tensors[name].dtype) for name in names], **named, **fields}

    with ThreadPoolExecutor(1) as pool:
        joining = pool.submit(
            init_custom_process_group,
            *("gloo", f"tcp://127.0.0.1:{port}", members + 1, 0, named["group_name"], timedelta(seconds=60)),
        )
        server.done("/init_weights_update_group", {**asked, **named, "backend": "gloo"})
        group = joining.result()

        def broadcast(names: list[str]) -> None:
            for name in names:
                dist.broadcast(tensors[name], src=0, group=group)

        for names in (list(tensors)[:20], list(tensors)[20:]):
            sending = pool.submit(broadcast, names)
            server.done("/update_weights_from_distributed", announced(names))
            sending.result()
        assert is_drawn(server, adapters, ("first", 1.0))
        tensors |= {"no.such.lora_A": torch.ones(4, 64), "no.such.lora_B": torch.ones(64, 4)}
        sending = pool.submit(broadcast, ["no.such.lora_A", "no.such.lora_B"])
        refused = server.post("/update_weights_from_distributed", announced(["no.such.lora_A", "no.such.lora_B"]))
        sending.result()
        assert refused.status_code == 400, refused.text
        assert "no.such" in refused.json()["message"]
        gone = server.post("/update_weights_from_distributed", announced(["no.such.lora_A", "no.such.lora_B"]))
        assert "does not exist" in gone.json()["message"], "a refusal ends the group, so that its members fail"
        dist.destroy_process_group(group)
    assert is_drawn(server, adapters, ("first", 1.0))


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
    assert "NaN" in refused(save(tensors | {first: tensors[first] * float("nan")}))
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
