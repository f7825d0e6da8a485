"""After every failed update, all bytes on all ranks and replicas are as before, and the reply says why."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save, save_file

from .conftest import Serve
from .trainer import SAFETENSORS, Trainer, changed, transformer


@pytest.fixture(scope="module")
def before(trainer: Trainer) -> dict[str, str]:
    return trainer.checksum()


@pytest.fixture(autouse=True)
def _unmoved(request: pytest.FixtureRequest) -> Iterator[None]:
    """The checksum after each test is the one before all of them, and the server still draws."""
    if "trainer" not in request.fixturenames:
        yield
        return
    trainer: Trainer = request.getfixturevalue("trainer")
    before: dict[str, str] = request.getfixturevalue("before")
    yield
    assert trainer.checksum() == before
    assert trainer.draw(num_inference_steps=1)["weight_version"] is not None
    assert list(trainer.shared().glob("upload-*")) == []


def some(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Half of the tensors, changed: what would be written if the other half were right."""
    new = changed(transformer(trainer.directory))
    return {name: new[name] for name in list(new)[::2]}


def test_an_unknown_name(trainer: Trainer) -> None:
    answer = trainer.send({**some(trainer), "nobody.weight": torch.zeros(2)})
    assert (answer.status_code, answer.json()["unknown"]) == (400, ["nobody.weight"])
    assert answer.json()["success"] is False


def test_a_wrong_shape(trainer: Trainer) -> None:
    new = some(trainer)
    name = max(new, key=lambda name: new[name].ndim)
    answer = trainer.send({**new, name: new[name][:-1].contiguous()})
    assert answer.status_code == 400
    assert [one["name"] for one in answer.json()["invalid"]] == [name]
    assert "shape" in answer.json()["invalid"][0]["reason"]


def test_a_dtype_of_another_kind(trainer: Trainer) -> None:
    new = some(trainer)
    name = next(iter(new))
    answer = trainer.send({**new, name: new[name].to(torch.int32)})
    assert answer.status_code == 400
    assert "int32" in answer.json()["invalid"][0]["reason"]


def test_an_unknown_module(trainer: Trainer) -> None:
    answer = trainer.send(some(trainer), target_module="unet")
    assert answer.status_code == 400
    assert "unet" in answer.json()["message"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda body: body[:-1],
        lambda body: body + b"\0",
        lambda body: b"",
        lambda body: b"\x80\x05no tensors",
        lambda body: struct.pack("<Q", 1 << 60) + body[8:],
        lambda body: body[:8] + b"[" + body[9:],
        lambda body: body.replace(b'"data_offsets":[0,', b'"data_offsets":[4,', 1),
        lambda body: body.replace(b'"F32"', b'"F99"', 1),
        lambda body: _head({"\ud800": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}),
        lambda body: _head({"x" * 5000: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}),
        lambda body: _head({"x": {"dtype": "F32", "shape": [0, 2**70], "data_offsets": [0, 0]}}),
        lambda body: _head({"x": {"dtype": "F32", "shape": [0, *[10**4000] * 300], "data_offsets": [0, 0]}}),
    ],
    ids=[
        "cut",
        "longer",
        "empty",
        "no safetensors",
        "giant header",
        "no JSON",
        "overlap",
        "unknown dtype",
        "surrogate name",
        "long name",
        "large shape",
        "enormous shape",
    ],
)
def test_bytes_that_are_not_a_safetensors_file(damage: Callable[[bytes], bytes], trainer: Trainer) -> None:
    answer = trainer.post("/update_weights_from_tensor", content=damage(save(some(trainer))), headers=SAFETENSORS)
    assert answer.status_code == 400, answer.text


def _head(header: dict[str, Any]) -> bytes:
    """A file without data."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text


def test_a_name_that_is_not_text_ends_no_process(trainer: Trainer) -> None:
    pids = [replica["pid"] for replica in trainer.replicas()]
    folder = trainer.shared() / "mine"
    folder.mkdir()
    (folder / "x").write_bytes(_head({"\ud800": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}))
    answer = trainer.post("/update_weights_from_tensor", {"shared": {"path": str(folder / "x")}})
    shutil.rmtree(folder)
    assert answer.status_code == 400
    assert [replica["pid"] for replica in trainer.replicas()] == pids


def test_a_length_that_is_announced_and_does_not_come_takes_no_memory(trainer: Trainer) -> None:
    url = httpx.URL(trainer.server.url)
    header = _head({"x": {"dtype": "U8", "shape": [9_000_000_000], "data_offsets": [0, 9_000_000_000]}})
    for sent in (b"abc", header, header + bytes(1 << 20)):
        with socket.create_connection((url.host, url.port)) as connection:
            length = 9_000_000_000 + len(header)
            head = f"POST /update_weights_from_tensor HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n"
            connection.sendall(f"{head}Content-Type: application/x-safetensors\r\n\r\n".encode() + sent)
            trainer.server.wait_for(lambda: list(trainer.shared().glob("upload-*")) or None, 30)
            time.sleep(0.2)
            taken = sum(file.stat().st_blocks for file in trainer.shared().rglob("*")) * 512
            assert taken < 20 << 20
        trainer.server.wait_for(lambda: not list(trainer.shared().glob("upload-*")) or None, 30)


def test_a_parameter_that_means_nothing_with_a_body(trainer: Trainer) -> None:
    for name in ("weight_update_mode", "lora_rank", "load_format", "target_modules"):
        assert trainer.send(some(trainer), **{name: "none of them"}).status_code == 422


@pytest.mark.parametrize("kind", ["pipe", "index pipe", "link out", "loop"])
def test_a_checkpoint_that_is_not_a_file(kind: str, trainer: Trainer, checkpoint: Path, tmp_path: Path) -> None:
    folder = checkpoint.parent / f"odd-{trainer.ranks}-{kind}" / "transformer"  # below a root
    folder.mkdir(parents=True)
    file = folder / "diffusion_pytorch_model.safetensors"
    if kind == "link out":
        save_file(some(trainer), tmp_path / "outside.safetensors")
        file.symlink_to(tmp_path / "outside.safetensors")
    elif kind == "loop":
        file.symlink_to(file)
    else:
        os.mkfifo(file if kind == "pipe" else folder / "diffusion_pytorch_model.safetensors.index.json")
    answer = trainer.post("/update_weights_from_disk", {"model_path": str(folder.parent)})
    shutil.rmtree(folder.parent)
    assert answer.status_code == 400, answer.text


def test_a_client_that_goes_away_while_its_update_waits_changes_nothing(trainer: Trainer) -> None:
    update_id = trainer.done("/begin_weights_update", {})["update_id"]
    with pytest.raises(httpx.TimeoutException):
        httpx.post(
            f"{trainer.server.url}/update_weights_from_tensor",
            content=save(changed(transformer(trainer.directory))),
            headers=SAFETENSORS,
            timeout=httpx.Timeout(30, read=1),
        )
    trainer.server.wait_for(lambda: not list(trainer.shared().glob("upload-*")) or None, 30)
    trainer.done("/abort_weights_update", {"update_id": update_id})


def test_a_body_that_ends_before_its_length(trainer: Trainer) -> None:
    body = save(some(trainer))
    url = httpx.URL(trainer.server.url)
    with socket.create_connection((url.host, url.port)) as connection:
        head = f"POST /update_weights_from_tensor HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        connection.sendall(f"{head}Content-Type: application/x-safetensors\r\n\r\n".encode() + body[: len(body) // 2])
    # and the client is gone


def test_a_client_that_goes_away_while_its_update_is_done_gets_all_of_it_or_nothing(trainer: Trainer) -> None:
    before = trainer.checksum()
    body = save(changed(transformer(trainer.directory)))
    url = httpx.URL(trainer.server.url)
    with socket.create_connection((url.host, url.port)) as connection:
        head = (
            "POST /update_weights_from_tensor?weight_version=left HTTP/1.1\r\n"
            f"Host: localhost\r\nContent-Length: {len(body)}"
        )
        connection.sendall(f"{head}\r\nContent-Type: application/x-safetensors\r\n\r\n".encode() + body)
    version = trainer.done("/get_weights_checksum", {"detail": True})["weight_version"]
    assert (trainer.checksum() != before) == (version == "left")
    trainer.restore()


@pytest.mark.parametrize("where", ["elsewhere", "link", "nowhere"])
def test_a_file_that_is_not_the_server_s_to_read(where: str, trainer: Trainer, tmp_path: Path) -> None:
    file = tmp_path / "tensors.safetensors"
    save_file(some(trainer), file)
    path = {"elsewhere": file, "nowhere": trainer.shared() / "nothing", "link": trainer.shared() / "link"}[where]
    if where == "link":
        path.symlink_to(file)
    answer = trainer.post("/update_weights_from_tensor", {"shared": {"path": str(path)}})
    if where == "link":
        path.unlink()
    assert answer.status_code == 400, answer.text


@pytest.mark.parametrize(
    "path",
    ["/etc", "{tmp}", "nowhere", "org/model", "{checkpoint}/scheduler", "~nobody-here/x", "a" * 300],
)
def test_a_checkpoint_that_may_not_or_cannot_be_read(
    path: str, trainer: Trainer, tmp_path: Path, checkpoint: Path
) -> None:
    named = path.format(tmp=tmp_path, checkpoint=checkpoint)
    answer = trainer.post("/update_weights_from_disk", {"model_path": named})
    assert answer.status_code == 400, answer.text


def test_a_checkpoint_that_lacks_a_module_that_was_asked_for(trainer: Trainer, checkpoint: Path) -> None:
    asked = {"model_path": str(checkpoint), "target_modules": ["transformer", "transformer_2"]}
    answer = trainer.post("/update_weights_from_disk", asked)
    assert answer.status_code == 400
    assert "transformer_2" in answer.json()["message"]


def test_a_body_with_an_unknown_field_or_a_wrong_type(trainer: Trainer, checkpoint: Path) -> None:
    for body in ({"model_path": str(checkpoint), "modules": []}, {"model_path": 3}, {}, {"shared": {}}):
        assert trainer.post("/update_weights_from_disk", body).status_code == 422


def test_a_begun_update_whose_client_vanishes_is_aborted(trainer: Trainer) -> None:
    update_id = trainer.done("/begin_weights_update", {"timeout_s": 0.3})["update_id"]
    trainer.update(some(trainer), update_id=update_id)
    trainer.draw()  # waits until it is over
    assert trainer.post("/commit_weights_update", {"update_id": update_id}).status_code == 400


def test_a_wrong_part_leaves_the_update_as_it_was(trainer: Trainer) -> None:
    new = changed(transformer(trainer.directory))
    update_id = trainer.done("/begin_weights_update", {"target_modules": ["transformer"]})["update_id"]
    trainer.update(new, update_id=update_id)
    assert trainer.send({"nobody": torch.zeros(1)}, update_id=update_id).status_code == 400
    assert trainer.send({}, update_id=update_id, target_module="vae").status_code == 400
    trainer.done("/commit_weights_update", {"update_id": update_id, "require_complete": True})
    trainer.restore()


def test_an_empty_update_cannot_be_committed(trainer: Trainer) -> None:
    update_id = trainer.done("/begin_weights_update", {})["update_id"]
    assert trainer.post("/commit_weights_update", {"update_id": update_id}).status_code == 400
    trainer.done("/abort_weights_update", {"update_id": update_id})


def test_a_journal_that_cannot_be_written_is_an_update_that_is_not_made(serve: Serve, tmp_path: Path) -> None:
    with serve("--weights-journal", str(tmp_path / "other"), "--replicas", "2") as trainer:
        before = trainer.checksum()
        shutil.rmtree(tmp_path / "other")
        (tmp_path / "other").write_text("a file stands where the directory should be")
        answer = trainer.send(changed(transformer(trainer.directory)))
        assert answer.status_code == 500
        assert "journal" in answer.json()["message"]
        assert trainer.checksum() == before
        (tmp_path / "other").unlink()
        trainer.update(changed(transformer(trainer.directory)), weight_version="kept")
        assert json.loads((tmp_path / "other" / "current.json").read_text())["weight_version"] == "kept"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_while_an_update_is_written(rank: int, serve: Serve) -> None:
    """Stopped before, so that the others wait for it in the vote when it is killed."""
    with serve("--replicas", "2", "--fuse-projections", tp=2) as trainer:  # as ``divided``, whose self-test serves
        before = trainer.checksum()
        victim = trainer.rank_processes(1)[rank]
        victim.send_signal(signal.SIGSTOP)
        body = save(changed(transformer(trainer.directory)))
        url = httpx.URL(trainer.server.url)
        with socket.create_connection((url.host, url.port)) as connection:
            head = f"POST /update_weights_from_tensor HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
            connection.sendall(f"{head}Content-Type: application/x-safetensors\r\n\r\n".encode() + body)
            trainer.server.wait_for(lambda: list(trainer.shared().glob("upload-*")) or None, 30)
            os.kill(victim.pid, signal.SIGKILL)
            connection.settimeout(60)
            assert connection.recv(4096).startswith(b"HTTP/1.1 503")
        trainer.wait_all_ready()
        assert trainer.checksum() == before


def test_a_rank_that_dies_while_an_update_is_open(serve: Serve) -> None:
    with serve("--replicas", "2") as trainer:
        new = changed(transformer(trainer.directory))
        update_id = trainer.done("/begin_weights_update", {"weight_version": "open"})["update_id"]
        trainer.update(new, update_id=update_id)
        os.kill(trainer.rank_processes(1)[0].pid, signal.SIGKILL)
        trainer.done("/commit_weights_update", {"update_id": update_id})
        trainer.wait_all_ready()
        reported = trainer.done("/get_weights_checksum", {"detail": True})  # a difference between replicas is a 500
        assert reported["weight_version"] == "open"
        assert {replica["state"] for replica in trainer.replicas()} == {"ready"}
