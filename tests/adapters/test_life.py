"""Adapters over the life of a server: at each station it draws what peft draws, and its weights are the base's."""

from __future__ import annotations

import base64
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from safetensors.torch import load, load_file, save_file

from safelight.client import Client
from safelight.tests.updates.trainer import Trainer, changed, transformer
from safelight.tests.worker.lora.agreement import distance

from .conftest import Adapters, Serve, listed

CLOSE = 1e-5


def drawn(server: Trainer, **changes: Any) -> torch.Tensor:
    (picture,) = load(base64.b64decode(server.draw(**changes)["outputs"][0]["b64"])).values()
    return picture


def is_drawn(server: Trainer, adapters: Adapters, *uses: tuple[str, float], **changes: Any) -> bool:
    return distance(drawn(server, **changes), adapters.drawn(*uses)) < CLOSE


def set_lora(server: Trainer, nickname: Any, **more: Any) -> dict[str, Any]:
    return server.done("/v1/set_lora", {"lora_nickname": nickname, **more})


def test_the_references_differ(adapters: Adapters) -> None:
    pictures = [adapters.drawn(*uses) for uses in ((), (("first", 1.0),), (("second", 1.0),), (("third", 1.0),))]
    distances = [distance(one, other) for i, one in enumerate(pictures) for other in pictures[:i]]
    assert min(distances) > 100 * CLOSE


def test_a_life(server: Trainer, adapters: Adapters) -> None:
    base, plain = server.checksum(), server.picture()
    path = adapters.path

    def station(*uses: tuple[str, float]) -> None:
        assert is_drawn(server, adapters, *uses), uses
        assert server.checksum() == base, uses

    reported = set_lora(server, "first", lora_path=path("first"), merge_mode="merge")
    assert reported["status"] == "ok"
    assert reported["active"]["transformer"] == [
        {"nickname": "first", "path": path("first"), "merged": True, "mode": "merge", "strength": 1.0}
    ]
    (loaded,) = reported["loaded_adapters"]
    assert (loaded["rank"], loaded["alpha"], loaded["path"]) == (4, 2.0, path("first"))
    station(("first", 1.0))
    set_lora(server, "first", strength=0.3, merge_mode="merge")
    station(("first", 0.3))
    set_lora(server, "second", lora_path=path("second"), merge_mode="dynamic", strength=1.5)
    station(("second", 1.5))
    server.done("/merge_lora_weights", {"target": "transformer"})
    station(("second", 1.5))
    set_lora(server, ["first", "second", "third"], lora_path=[None, None, path("third")], strength=[1.0, -0.5, 0.7])
    station(("first", 1.0), ("second", -0.5), ("third", 0.7))
    server.done("/v1/merge_lora_weights", {"strength": 0.5})
    station(("first", 0.5), ("second", 0.5), ("third", 0.5))
    assert [one["strength"] for one in listed(server)["active"]["transformer"]] == [0.5] * 3
    server.done("/v1/unmerge_lora_weights", {})
    station()
    assert not any(one["merged"] for one in listed(server)["active"]["transformer"])
    server.done("/v1/merge_lora_weights", {})
    station(("first", 0.5), ("second", 0.5), ("third", 0.5))
    set_lora(server, "third", merge_mode="dynamic")
    station(("third", 1.0))
    server.done("/v1/unload_lora", {"lora_nickname": "third"})
    station()
    assert server.picture() == plain
    set_lora(server, ["first", "second"], merge_mode="merge")
    server.done("/v1/unload_lora", {"lora_nickname": "first"})
    station(("second", 1.0))
    server.done("/v1/unload_lora", {"lora_nickname": "second"})
    assert listed(server) == {"loaded_adapters": [], "active": {}}
    assert (server.picture(), server.checksum()) == (plain, base)


def test_each_nickname_has_its_own_target_and_alpha(server: Trainer, adapters: Adapters) -> None:
    paths = [adapters.path("first"), adapters.path("second")]
    lists = {"target": ["transformer", "all"], "lora_alpha": [4.0, None], "strength": [0.5, 0.7]}
    set_lora(server, ["first", "second"], lora_path=paths, merge_mode="merge", **lists)
    assert is_drawn(server, adapters, ("first", 1.0), ("second", 0.7))
    body = {"lora_nickname": ["first", "second"], "target": ["transformer"]}
    assert "2 nicknames and 1 of target" in server.post("/v1/set_lora", body).json()["error"]["message"]


def test_layers_that_the_model_does_not_have_are_left_out_where_that_is_asked_for(
    alone: Trainer, adapters: Adapters
) -> None:
    tensors = load_file(f"{adapters.path('first')}/adapter_model.safetensors")
    tensors |= {f"connectors.x.lora_{letter}.weight": torch.ones(4, 4) for letter in "AB"}
    (adapters.folder / "more").mkdir()
    save_file(tensors, adapters.folder / "more" / "adapter_model.safetensors")
    body = {"lora_nickname": "more", "lora_path": adapters.path("more"), "lora_alpha": 2.0, "merge_mode": "merge"}
    refused = alone.post("/v1/set_lora", body)
    assert (refused.status_code, "connectors.x" in refused.text) == (400, True)
    with Client(alone.server.url) as client:
        done = client.set_lora("more", adapters.path("more"), alpha=2.0, mode="merge", strict=False)
        assert [one.left for one in done.loaded] == [("connectors.x",)]
        assert "1 layers have no place in the model" in done.message
    assert is_drawn(alone, adapters, ("first", 1.0))
    alone.done("/v1/unload_lora", {"lora_nickname": "more"})


def test_requests_with_their_own_adapters(server: Trainer, adapters: Adapters) -> None:
    nicknames = ["first", "second", "third"]
    set_lora(server, nicknames, lora_path=[adapters.path(name) for name in nicknames], merge_mode="request")
    assert listed(server)["active"] == {}
    first, third = ("first", 1.0), ("third", -1.0)
    choices: list[list[tuple[str, float]]] = [[first], [], [("second", 0.5), third], [third]]
    bodies = [
        {"lora": [{"name": name, "scale": scale} for name, scale in uses], "deterministic": deterministic}
        for uses in choices
        for deterministic in (True, False, False)
    ]
    with ThreadPoolExecutor(len(bodies)) as pool:
        pictures = list(pool.map(lambda body: drawn(server, **body), bodies))
    for number, picture in enumerate(pictures):
        assert distance(picture, adapters.drawn(*choices[number // 3])) < CLOSE
    assert is_drawn(server, adapters)
    set_lora(server, "first", merge_mode="dynamic")
    assert is_drawn(server, adapters, ("first", 1.0))
    assert is_drawn(server, adapters, ("second", 1.0), lora=[{"name": "second"}])
    assert is_drawn(server, adapters, lora=[])


def test_adapters_outlive_a_change_of_the_base(server: Trainer, adapters: Adapters) -> None:
    base, own = server.checksum(), transformer(adapters.checkpoint)
    name = next(name for name in own if name.endswith("to_q.weight"))
    for mode in ("merge", "dynamic"):
        set_lora(server, "first", lora_path=adapters.path("first"), merge_mode=mode)
        before = server.picture()
        reported = server.update({name: own[name] + 0.05})
        assert ("merged_adapters" in reported["invalidated"]) == (mode == "merge")
        assert server.checksum()["transformer"] != base["transformer"]
        assert server.picture() != before
        server.update({name: own[name]})
        assert server.checksum() == base
        assert is_drawn(server, adapters, ("first", 1.0))
        refused = server.send({**changed({name: own[name]}), "none.such": own[name]})
        assert refused.status_code == 400
        assert server.picture() == before
    server.restore()
    assert server.checksum() == base


def test_adapters_sleep_with_the_weights(server: Trainer, adapters: Adapters) -> None:
    base, plain = server.checksum(), server.picture()
    for mode in ("merge", "dynamic"):
        set_lora(server, "first", lora_path=adapters.path("first"), merge_mode=mode)
        server.done("/release_memory_occupation", {})
        assert server.checksum() == base
        server.done("/resume_memory_occupation", {})
        assert is_drawn(server, adapters, ("first", 1.0))
    set_lora(server, "second", lora_path=adapters.path("second"), merge_mode="merge")
    server.done("/release_memory_occupation", {})
    server.done("/v1/unload_lora", {"lora_nickname": "second"})
    set_lora(server, "third", lora_path=adapters.path("third"), merge_mode="merge")
    assert server.checksum() == base
    server.done("/resume_memory_occupation", {})
    assert is_drawn(server, adapters, ("third", 1.0))
    server.done("/v1/unmerge_lora_weights", {})
    assert (server.picture(), server.checksum()) == (plain, base)


def test_a_server_that_starts_with_adapters(serve: Serve, adapters: Adapters) -> None:
    given = f"first={adapters.path('first')},second={adapters.path('second')}"
    with serve("--lora", given, "--lora-mode", "merge", "--replicas", "2") as server:
        assert is_drawn(server, adapters, ("first", 1.0), ("second", 1.0))
        base = server.checksum()
        server.done("/v1/unload_lora", {"lora_nickname": "first"})
        assert is_drawn(server, adapters, ("second", 1.0))
        server.rank_processes(1)[0].kill()
        server.wait_lost(1)
        server.wait_all_ready()
        assert all(is_drawn(server, adapters, ("second", 1.0)) for _ in range(4))
        assert server.checksum() == base
