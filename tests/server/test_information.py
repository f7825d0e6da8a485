"""Health, information and metrics say what the scheduler said last."""

from __future__ import annotations

import msgspec
import pytest

from safelight import __version__
from safelight.protocol.compiling import CompiledComponentStats
from safelight.protocol.config import Config
from safelight.protocol.replicas import GraphStats, ReplicaStats, ReplicaStatus, Status
from safelight.server import scheduler_link

from .played_scheduler import IMAGE_MODEL
from .stage import stage

pytestmark = pytest.mark.anyio

STARTING = ReplicaStatus(replica=0, state="starting", message="loading the model", pid=4)
LOST = ReplicaStatus(replica=0, state="lost", message="killed by SIGKILL", model=IMAGE_MODEL)
READY = ReplicaStatus(
    replica=1, state="ready", message="ready", pid=5, model=IMAGE_MODEL, stats=ReplicaStats(2, 30, 60, 7, 1, 3)
)


@pytest.mark.parametrize(
    ("replicas", "status", "word"),
    [
        ([], 503, "starting"),
        ([STARTING], 503, "starting"),
        ([LOST], 503, "unavailable"),
        ([LOST, READY], 200, "ok"),
    ],
)
@pytest.mark.parametrize("path", ["/health", "/health_generate"])
async def test_health_is_200_only_with_a_ready_replica_and_gives_every_reason(
    path: str, replicas: list[ReplicaStatus], status: int, word: str
) -> None:
    async with stage(status=Status(0, 0, replicas)) as played:
        reply = await played.client.get(path)
    assert (reply.status_code, reply.json()["status"]) == (status, word)
    assert [entry["message"] for entry in reply.json()["replicas"]] == [replica.message for replica in replicas]
    if status == 503:
        assert reply.headers["retry-after"] == "5"
        assert all(replica.message in reply.json()["error"]["message"] for replica in replicas)


async def test_health_is_503_when_the_scheduler_has_gone_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    async with stage() as played:
        monkeypatch.setattr(scheduler_link, "STATUS_FRESH_S", 0.0)
        reply = await played.client.get("/health")
    assert reply.status_code == 503
    assert "does not answer" in reply.json()["error"]["message"]


async def test_liveness_needs_no_replica() -> None:
    async with stage(status=Status(0, 0, [])) as played:
        assert (await played.client.get("/liveness")).status_code == 200


async def test_server_info_says_how_and_why_requests_share_forwards_and_keeps_the_key() -> None:
    key = {"Authorization": "Bearer open-sesame"}
    async with stage(Config(api_key="open-sesame", max_steps=7), status=Status(3, 2, [LOST, READY])) as played:
        reply = await played.client.get("/server_info", headers=key)
    info = reply.json()
    assert "open-sesame" not in reply.text
    assert "api_key" not in info["config"]
    assert info["config"]["max_steps"] == 7
    assert info["version"] == __version__
    assert info["batching"] == {"mode": "merged", "reason": "because"}
    assert (info["queued"], info["running"]) == (3, 2)
    assert [replica["state"] for replica in info["replicas"]] == ["lost", "ready"]
    assert info["models"] == [msgspec.to_builtins(IMAGE_MODEL)]
    assert info["uptime_s"] >= 0


async def test_model_info_lists_the_arguments() -> None:
    async with stage() as played:
        info = (await played.client.get("/model_info")).json()
        version = (await played.client.get("/get_weight_version")).json()
    assert info == msgspec.to_builtins(IMAGE_MODEL)
    assert version == {"weight_version": "7"}


async def test_the_model_is_known_while_its_replica_restarts_but_not_before_the_first_start() -> None:
    async with stage(status=Status(0, 0, [LOST])) as played:
        assert (await played.client.get("/model_info")).status_code == 200
    async with stage(status=Status(0, 0, [STARTING])) as played:
        reply = await played.client.get("/get_weight_version")
    assert (reply.status_code, "retry-after" in reply.headers) == (503, True)


async def test_metrics_show_queue_and_replicas() -> None:
    async with stage(status=Status(3, 2, [LOST, READY])) as played:
        found = {name: await played.metric(f"safelight_{name}") for name in ("queued_requests", "running_requests")}
        up = [await played.metric(f'safelight_replica_up{{replica="{number}"}}') for number in (0, 1)]
        counters = {
            name: await played.metric(f'safelight_replica_{name}_total{{replica="1"}}')
            for name in ("forwards", "calls", "outputs", "cancelled", "failed")
        }
    assert found == {"queued_requests": 3, "running_requests": 2}
    assert up == [0, 1]
    assert counters == {"forwards": 30, "calls": 60, "outputs": 7, "cancelled": 1, "failed": 3}


async def test_graphs_are_counted_and_the_reason_for_having_none_is_shown() -> None:
    counts = {"captures": 4, "replays": 300, "misses": 20, "evictions": 1}
    on = msgspec.structs.replace(READY, stats=ReplicaStats(graphs=GraphStats(state="on", mb=12.5, **counts)))
    off = msgspec.structs.replace(LOST, stats=ReplicaStats(graphs=GraphStats(reason="the model runs on cpu")))
    async with stage(status=Status(0, 0, [off, on])) as played:
        found = {name: await played.metric(f'safelight_replica_graph_{name}_total{{replica="1"}}') for name in counts}
        assert await played.metric('safelight_replica_graph_mb{replica="1"}') == 12.5
        replicas = (await played.client.get("/server_info")).json()["replicas"]
    assert found == counts
    assert replicas[0]["stats"]["graphs"]["reason"] == "the model runs on cpu"


async def test_compiled_components_are_counted_by_name_and_say_why_they_run_eagerly() -> None:
    compiled = {
        "transformer": CompiledComponentStats(
            state="compiled", graphs={"A": 2, "B": 1}, calls=90, eager_calls=6, kinds_over_limit=5
        ),
        "transformer_2": CompiledComponentStats(state="eager", reason="A does not compile"),
    }
    replica = msgspec.structs.replace(READY, stats=ReplicaStats(compiled=compiled))
    async with stage(status=Status(0, 0, [replica])) as played:
        counters = {
            name: await played.metric(f'safelight_compiled_{name}_total{{component="transformer",replica="1"}}')
            for name in ("graphs", "block_calls", "eager_block_calls", "kinds_over_limit")
        }
        information = (await played.client.get("/server_info")).json()
    assert counters == {"graphs": 3, "block_calls": 84, "eager_block_calls": 6, "kinds_over_limit": 5}
    found = information["replicas"][0]["stats"]["compiled"]
    assert (found["transformer_2"]["state"], found["transformer_2"]["reason"]) == ("eager", "A does not compile")


async def test_two_servers_in_one_process_have_metrics_of_their_own() -> None:
    async with stage() as one, stage() as two:
        await one.client.post("/generate", json={"prompt": "a"})
        assert await one.metric("safelight_outputs_total") == 1
        assert await two.metric("safelight_outputs_total") == 0
