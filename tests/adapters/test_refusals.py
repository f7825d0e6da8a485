"""Wrong requests about adapters are refused by name, and change nothing."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from safelight.tests.live import LiveServer
from safelight.tests.updates.trainer import DRAWING, Trainer

from .conftest import Adapters, Serve, listed
from .test_life import is_drawn, set_lora


def refused(server: Trainer, status: int, path: str, body: dict[str, Any]) -> str:
    """The message of an error of such a status, after which nothing has changed."""
    before, weights = listed(server), server.checksum()
    answer = server.post(path, body)
    assert answer.status_code == status, answer.text
    assert (listed(server), server.checksum()) == (before, weights)
    message: str = answer.json()["error"]["message"]
    return message


@pytest.fixture
def altered(adapters: Adapters) -> Path:
    """A copy of the first adapter, to be spoilt."""
    target = Path(tempfile.mkdtemp(dir=adapters.folder))
    shutil.copytree(adapters.folder / "first", target, dirs_exist_ok=True)
    return target


def spoil(folder: Path, kind: str) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    first = next(name for name in tensors if "lora_B" in name)
    match kind:
        case "of another model":
            save_file({f"base_model.model.down_blocks.{name[17:]}": tensor for name, tensor in tensors.items()}, file)
        case "half":
            save_file({name: tensor for name, tensor in tensors.items() if name != first}, file)
        case "not a number":
            save_file(tensors | {first: tensors[first] / 0}, file)
        case "wrong shape":
            save_file(tensors | {first: tensors[first][:-1].contiguous()}, file)
        case "pickled":
            file.rename(folder / "adapter_model.bin")
        case "header of 10 GB":
            file.write_bytes((10 << 30).to_bytes(8, "little") + file.read_bytes()[8:])
        case "broken configuration":
            (folder / "adapter_config.json").write_text("{")
        case "DoRA":
            config = json.loads((folder / "adapter_config.json").read_text())
            (folder / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))


@pytest.mark.parametrize(
    ("kind", "reported"),
    [
        ("of another model", "layers that the model does not have"),
        ("half", "have no counterpart"),
        ("not a number", "infinite values or NaN"),
        ("wrong shape", "do not fit"),
        ("pickled", "safetensors"),
        ("header of 10 GB", "not a safetensors file"),
        ("broken configuration", "adapter_config.json"),
        ("DoRA", "DoRA"),
    ],
)
def test_adapters_that_cannot_be_used(kind: str, reported: str, server: Trainer, altered: Path) -> None:
    spoil(altered, kind)
    status = 404 if kind == "pickled" else 400
    message = refused(server, status, "/v1/set_lora", {"lora_nickname": "bad", "lora_path": str(altered)})
    assert reported.lower() in message.lower(), message
    assert list(server.shared().glob("adapter-*")) == []


def test_what_is_asked_wrongly(server: Trainer, adapters: Adapters) -> None:
    path = adapters.path("first")
    assert "'nobody'" in refused(server, 404, "/v1/set_lora", {"lora_nickname": "nobody"})
    assert "'nobody'" in refused(server, 404, "/unload_lora", {"lora_nickname": "nobody"})
    assert "'nobody'" in refused(server, 404, "/generate", DRAWING | {"lora": [{"name": "nobody"}]})
    given = {"lora_nickname": "first", "lora_path": path}
    assert "'unet'" in refused(server, 404, "/v1/set_lora", given | {"target": "unet"})
    assert "no layers of text_encoder" in refused(server, 400, "/v1/set_lora", given | {"target": "text_encoder"})
    assert "nowhere" in refused(server, 404, "/v1/set_lora", given | {"lora_path": path + "/nowhere"})
    assert "--weights-roots" in refused(server, 403, "/v1/set_lora", given | {"lora_path": "/etc"})
    assert "strength" in refused(server, 400, "/v1/set_lora", given | {"strength": [1, 2]})
    assert "±100" in refused(server, 400, "/v1/set_lora", given | {"strength": 1e9})
    assert "twice" in refused(server, 400, "/v1/set_lora", {"lora_nickname": ["a", "a"], "lora_path": [path, path]})
    assert "nickname" in refused(server, 422, "/v1/set_lora", {"nickname": "first"})
    assert "active" in refused(server, 409, "/v1/merge_lora_weights", {})
    assert "lora[0].scale" in refused(server, 422, "/generate", DRAWING | {"lora": [{"name": "a", "scale": "1"}]})
    assert "twice" in refused(server, 400, "/generate", DRAWING | {"lora": [{"name": "a"}, {"name": "a"}]})


def copies(server: Trainer) -> int:
    return len(list(server.shared().glob("adapter-*")))


def test_files_are_kept_for_as_long_as_they_are_needed(server: Trainer, adapters: Adapters) -> None:
    """Independently of the server's reply: a replica that restarts reads the files."""
    set_lora(server, "first", lora_path=adapters.path("first"), merge_mode="merge")
    server.done("/pause_generation", {"mode": "wait"})
    server.done("/continue_generation", {})
    server.done("/abort_request", {"all": True})
    assert server.post("/v1/set_lora", {"lora_nickname": "x", "lora_path": "/none"}).status_code in (403, 404)
    assert copies(server) == 1
    server.done("/v1/unload_lora", {"lora_nickname": "first"})
    assert copies(server) == 0


def test_an_alpha_for_what_is_loaded_is_not_ignored(server: Trainer, adapters: Adapters) -> None:
    set_lora(server, "first", lora_path=adapters.path("first"), merge_mode="request")
    assert "path" in refused(server, 400, "/v1/set_lora", {"lora_nickname": "first", "lora_alpha": 3})
    server.done("/v1/unload_lora", {"lora_nickname": "first"})


def test_a_file_that_has_changed_is_read_again(server: Trainer, adapters: Adapters, altered: Path) -> None:
    set_lora(server, "mine", lora_path=str(altered))
    assert is_drawn(server, adapters, ("first", 1.0))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(adapters.folder / "third" / name, altered / name)
    set_lora(server, "mine")
    assert is_drawn(server, adapters, ("first", 1.0)), "without a path what is loaded is used"
    set_lora(server, "mine", lora_path=str(altered))
    assert is_drawn(server, adapters, ("third", 1.0))
    set_lora(server, "mine", lora_path=str(altered), lora_alpha=0.5)
    assert is_drawn(server, adapters, ("third", 0.5))
    assert len(list(server.shared().glob("adapter-*"))) == 1


def test_the_least_recently_used_adapters_are_evicted(serve: Serve, adapters: Adapters) -> None:
    with serve("--max-loras", "2") as server:
        for name in ("first", "second"):
            set_lora(server, name, lora_path=adapters.path(name), merge_mode="request")
        server.draw(lora=[{"name": "first"}])
        reported = set_lora(server, "third", lora_path=adapters.path("third"), merge_mode="request")
        assert [one["nickname"] for one in reported["loaded_adapters"]] == ["first", "third"]
        assert "second was unloaded" in reported["message"]
        set_lora(server, ["first", "third"], merge_mode="dynamic")
        body = {"lora_nickname": "second", "lora_path": adapters.path("second"), "merge_mode": "request"}
        assert "At most 2 adapters" in refused(server, 409, "/v1/set_lora", body)
        assert is_drawn(server, adapters, ("first", 1.0), ("third", 1.0))


def test_a_server_that_cannot_start_with_its_adapters_says_so(adapters: Adapters, tmp_path: Path) -> None:
    for given, reported in ((f"a={tmp_path}", "no safetensors file"), ("nonsense", "name=path")):
        server = LiveServer(adapters.checkpoint, ["--lora", given, "--weights-roots", "/"])
        with pytest.raises(AssertionError), server:
            server.wait_ready()
        assert reported in server.log
