"""A replica that comes back serves what was committed, or nothing: never older weights, never spoilt ones."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file, save_file

from .conftest import Serve
from .trainer import DRAWING, Trainer, changed, transformer


@pytest.fixture(scope="module")
def two(serve: Serve) -> Iterator[Trainer]:
    """Two replicas, without a journal."""
    with serve("--replicas", "2") as trainer:
        yield trainer


def kill(trainer: Trainer, replica: int, rank: int = 0) -> None:
    """Returns when the scheduler knows."""
    os.kill(trainer.rank_processes(replica)[rank].pid, signal.SIGKILL)
    trainer.wait_lost(replica)


def message(trainer: Trainer) -> str:
    found: str = trainer.replicas()[0]["message"]
    return found


def wait_for_message(trainer: Trainer, text: str) -> None:
    trainer.server.wait_for(lambda: text in message(trainer) or None, 60)


def version(trainer: Trainer) -> str:
    found: str = httpx.get(f"{trainer.server.url}/get_weight_version").json()["weight_version"]
    return found


def test_what_comes_back_has_the_committed_weights_before_it_is_asked_for_anything(two: Trainer) -> None:
    own = transformer(two.directory)
    two.update(changed(own, 0.2), weight_version="old")
    two.update(dict(list(changed(own, 0.3).items())[::2]), weight_version="new")
    wanted, picture = two.checksum(), two.picture()
    kill(two, 1)

    def back() -> bool:
        return two.replicas()[1]["state"] == "ready"

    def client() -> tuple[set[str], set[Any]]:
        """Draw until a while after the replica is back. Returns the outputs, and the replica of each."""
        seen, until = set(), time.monotonic() + 60
        while time.monotonic() < until:
            reported = two.draw()
            seen.add((reported["weight_version"], reported["outputs"][0]["b64"]))
            until = min(until, time.monotonic() + 1) if back() else until
        return {found for found, _ in seen}, {drawn for _, drawn in seen}

    with ThreadPoolExecutor(2) as pool:
        clients = [pool.submit(client) for _ in range(2)]
        for versions, drawn in (one.result() for one in clients):
            assert (versions, len(drawn)) == ({"new"}, 1)
    assert back()
    assert two.checksum() == wanted  # a difference between replicas is a 500
    assert two.picture() == picture
    two.update(own, weight_version="again")
    assert two.done("/get_weights_checksum", {"detail": True})["weight_version"] == "again"


@pytest.mark.parametrize("delay_s", [0.0, 0.02])
def test_whenever_a_rank_dies_during_an_update_all_replicas_have_it_or_none(delay_s: float, two: Trainer) -> None:
    before, new = two.checksum(), changed(transformer(two.directory), 0.5 + delay_s)
    name = f"during-{delay_s}"
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(two.send, new, weight_version=name)
        two.server.wait_for(lambda: list(two.shared().glob("upload-*")) or answer.done() or None, 30)
        time.sleep(delay_s)
        kill(two, 1)
        done = answer.result().status_code == 200
    assert done or answer.result().status_code == 503
    two.wait_all_ready()
    assert (two.checksum() == before) != done
    assert (two.draw()["weight_version"] == name) == done


def test_weights_that_nobody_has_any_more_are_read_again_from_disk_or_not_replaced_by_older_ones(serve: Serve) -> None:
    with serve() as trainer:
        own = transformer(trainer.directory)
        folder = trainer.directory.parent / "on-disk" / "transformer"
        folder.mkdir(parents=True)
        file = folder / "diffusion_pytorch_model.safetensors"
        save_file(changed(own, 0.2), file)
        part = folder / "part.safetensors"
        save_file(dict(list(changed(own, 0.3).items())[::2]), part)
        trainer.done("/update_weights_from_disk", {"model_path": str(folder), "weight_version": "from disk"})
        trainer.done("/update_weights_from_disk", {"model_path": str(part), "weight_version": "and a part"})
        wanted, picture = trainer.checksum(), trainer.picture()
        kill(trainer, 0)
        trainer.wait_all_ready()
        assert (trainer.checksum(), trainer.picture(), version(trainer)) == (wanted, picture, "and a part")
        new = changed(own)
        trainer.update(new, weight_version="0")  # the version that the checkpoint itself has
        wanted = trainer.checksum()
        kill(trainer, 0)
        wait_for_message(trainer, "were lost")
        refused = trainer.post("/generate", DRAWING)
        assert refused.status_code == 503
        assert "weights of version 0 were lost" in refused.json()["error"]["message"]
        assert not trainer.server.healthy
        partly = trainer.send(dict(list(new.items())[::2]))
        assert (partly.status_code, "every tensor of transformer" in partly.json()["message"]) == (409, True)
        assert trainer.post("/generate", DRAWING).status_code == 503
        vae = load_file(trainer.directory / "vae" / "diffusion_pytorch_model.safetensors")
        reported = trainer.update(vae, target_module="vae")
        assert not reported["serving"]
        assert "cannot serve yet" in reported["message"]
        assert "update transformer again" in reported["message"]
        update_id = trainer.done("/begin_weights_update", {"weight_version": "sent again"})["update_id"]
        for part in (dict(list(new.items())[::2]), dict(list(new.items())[1::2])):
            trainer.update(part, update_id=update_id)
        assert trainer.done("/commit_weights_update", {"update_id": update_id})["serving"]
        trainer.wait_all_ready()
        assert (trainer.checksum(), version(trainer)) == (wanted, "sent again")
        assert trainer.draw()["weight_version"] == "sent again"


def test_with_a_journal_updates_outlive_a_process_a_server_and_a_tensor_parallel_degree(
    serve: Serve, tmp_path: Path
) -> None:
    journal = tmp_path / "journal"
    with serve("--weights-journal", str(journal)) as trainer:
        own = transformer(trainer.directory)
        trainer.update(changed(own), weight_version="first")
        trainer.update(dict(list(changed(own, 0.7).items())[::2]), weight_version="kept")
        wanted = trainer.checksum()
        kill(trainer, 0)
        trainer.wait_all_ready()
        assert (trainer.checksum(), trainer.draw()["weight_version"]) == (wanted, "kept")
        _no_room(trainer, journal)
        assert (trainer.checksum(), version(trainer)) == (wanted, "kept")
    with serve("--weights-journal", str(journal), tp=2) as trainer:
        assert (trainer.checksum(), trainer.draw()["weight_version"]) == (wanted, "kept")
        trainer.update(own, weight_version="by two")
        update_id = trainer.done("/begin_weights_update", {})["update_id"]
        trainer.update(changed(own, 0.9), update_id=update_id)
        trainer.done("/abort_weights_update", {"update_id": update_id})
    current = json.loads((journal / "current.json").read_text())
    assert current["weight_version"] == "by two"
    assert [folder.name for folder in journal.glob("version-*")] == [current["folder"]]
    modes = {path.stat().st_mode & 0o777 for path in (journal, *journal.rglob("*"))}
    assert modes == {0o700, 0o600}, "nobody else reads the weights"
    for damage in DAMAGES:
        _refused(trainer.directory, journal, damage)


def _no_room(trainer: Trainer, journal: Path) -> None:
    """A disk that takes no more is an update that is not made; one that does again is one that is."""
    leader, before = trainer.rank_processes(0)[0].pid, trainer.checksum()
    files = set(journal.rglob("*"))
    for room in (0, 20_000):  # for no byte, and for a part of the file
        usual = resource.prlimit(leader, resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
        answer = trainer.send(changed(transformer(trainer.directory)), weight_version="no room")
        resource.prlimit(leader, resource.RLIMIT_FSIZE, usual)
        assert (answer.status_code, "journal" in answer.json()["message"]) == (500, True)
        assert trainer.checksum() == before
        assert set(journal.rglob("*")) - files <= {journal / "current.json.new"}


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)


DAMAGES: list[Callable[[Path, Path], object]] = [
    lambda tensors, current: _flip(tensors),
    lambda tensors, current: tensors.write_bytes(tensors.read_bytes()[:-4]),
    lambda tensors, current: current.write_bytes(b""),
]


def _start(checkpoint: Path, journal: Path) -> str:
    """The message of a server that does not start."""
    command = [sys.executable, "-P", "-m", "safelight.server", str(checkpoint), "--port", "0", "--threads", "1"]
    ended = subprocess.run(
        [*command, "--weights-journal", str(journal)], capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode in (1, 2), ended.stderr
    return ended.stderr


def test_two_servers_do_not_share_a_journal_and_other_folders_in_it_are_nobody_s_to_remove(
    serve: Serve, tmp_path: Path
) -> None:
    own = tmp_path / "version-2-of-my-model"
    own.mkdir()
    with serve("--weights-journal", str(tmp_path)) as trainer:
        assert "it is another running server's" in _start(trainer.directory, tmp_path)
        trainer.update(changed(transformer(trainer.directory)))
    assert own.is_dir()


def _refused(checkpoint: Path, journal: Path, damage: Callable[[Path, Path], object]) -> None:
    """A server does not start with a damaged journal, and says so."""
    current = journal / "current.json"
    tensors = journal / json.loads(current.read_text())["folder"] / "transformer.safetensors"
    good = current.read_bytes(), tensors.read_bytes()
    damage(tensors, current)
    assert f"The journal {journal} cannot be replayed" in _start(checkpoint, journal)
    current.write_bytes(good[0])
    tensors.write_bytes(good[1])


def test_a_journal_whose_keeper_died_in_a_commit_is_mended(serve: Serve, tmp_path: Path) -> None:
    """Replica 0 keeps the journal; with an older one it comes back as if it had died before the move."""
    journal, old = tmp_path / "journal", tmp_path / "old"
    with serve("--weights-journal", str(journal), "--replicas", "2") as trainer:
        own = transformer(trainer.directory)
        trainer.update(changed(own), weight_version="before")
        subprocess.run(["cp", "-r", str(journal), str(old)], check=True)
        trainer.update(changed(own, 0.7), weight_version="committed")
        wanted = trainer.checksum()
        for found in old.iterdir():
            subprocess.run(["cp", "-r", str(found), str(journal)], check=True)
        kill(trainer, 0)
        trainer.wait_all_ready()
        assert (trainer.checksum(), version(trainer)) == (wanted, "committed")
        assert json.loads((journal / "current.json").read_text())["weight_version"] == "committed"
