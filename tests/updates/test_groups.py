"""A trainer in another process broadcasts into the running model, and no failure of either side hangs the other."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from safelight.tests.effort import NIGHTLY

from .trainer import Trainer
from .training import TrainingProcess

SOON_S = 4.0
"""The groups' timeout in tests that wait for it."""

_names = (f"group-{number}" for number in itertools.count())


@pytest.fixture(scope="module")
def training(checkpoint: Path) -> Iterator[TrainingProcess]:
    with TrainingProcess(checkpoint) as process:
        yield process


@pytest.fixture(autouse=True)
def _unmoved(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each test leaves the weights of the server that it shares with others, which then draws."""
    trainer: Trainer | None = request.getfixturevalue("trainer") if "trainer" in request.fixturenames else None
    before = trainer.checksum() if trainer else None
    yield
    if trainer:
        assert trainer.checksum() == before
        trainer.draw()


def members(trainer: Trainer) -> int:
    """The server's ranks."""
    return int(httpx.get(f"{trainer.server.url}/server_info").json()["world_size"])


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as held:
        return int(held.getsockname()[1])


def asked(trainer: Trainer, group: str, **changes: Any) -> dict[str, Any]:
    """The body of ``/init_weights_update_group``."""
    return {
        "master_address": "127.0.0.1",
        "master_port": free_port(),
        "rank_offset": 1,
        "world_size": 1 + members(trainer),
        "group_name": group,
        "backend": "gloo",
        **changes,
    }


def join(trainer: Trainer, training: TrainingProcess, group: str | None = None, **changes: Any) -> str:
    """A group of the trainer and all ranks."""
    group = group or next(_names)
    body = asked(trainer, group, **changes)
    training.send("join", port=body["master_port"], world_size=body["world_size"], group=group)
    assert trainer.done("/init_weights_update_group", body)["ranks"] == members(trainer)
    training.answer()
    return group


@contextmanager
def broadcasting(
    trainer: Trainer, training: TrainingProcess, group: str, tensors: int = 10_000, **changes: Any
) -> Iterator[Future[httpx.Response]]:
    """The server's reply to an update, while the trainer broadcasts the first ``tensors`` of it."""
    body = training.do("announced") | {"group_name": group} | changes
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(trainer.post, "/update_weights_from_distributed", body)
        training.send("broadcast", group=group, tensors=tensors)
        yield answer


def update(trainer: Trainer, training: TrainingProcess, group: str, **changes: Any) -> dict[str, Any]:
    with broadcasting(trainer, training, group, **changes) as answer:
        assert answer.result().status_code == 200, answer.result().text
        training.answer()
    reported: dict[str, Any] = answer.result().json()
    return reported


def check(trainer: Trainer, training: TrainingProcess) -> None:
    """The server has what the trainer has."""
    body = {"expected_named_tensors_sha256": training.do("digests")}
    trainer.done("/update_weights_from_tensor_checker", body)


def leave(trainer: Trainer, training: TrainingProcess, group: str) -> None:
    trainer.done("/destroy_weights_update_group", {"group_name": group})
    training.do("leave", group=group)


@contextmanager
def soon(limit_s: float = SOON_S + 4) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < limit_s


def test_after_every_step_the_server_has_what_the_trainer_has(trainer: Trainer, training: TrainingProcess) -> None:
    group = join(trainer, training)
    for number in range(3):
        training.do("step")
        reported = update(trainer, training, group, weight_version=f"step-{number}")
        assert (reported["applied"], reported["applied"], reported["ranks"]) == (
            reported["expected"],
            len(training.do("announced")["names"]),
            members(trainer),
        )
        check(trainer, training)
        assert trainer.draw()["weight_version"] == f"step-{number}"
    leave(trainer, training, group)
    trainer.restore()


def test_a_name_is_free_again_when_its_group_is_destroyed(trainer: Trainer, training: TrainingProcess) -> None:
    for _ in range(2):
        leave(trainer, training, join(trainer, training, "again"))


def test_broadcasts_are_parts_of_a_begun_update_and_an_abort_takes_all_of_them_back(
    trainer: Trainer, training: TrainingProcess
) -> None:
    before, group = trainer.checksum(), join(trainer, training)
    for end in ("abort", "commit"):
        update_id = trainer.done("/begin_weights_update", {"weight_version": "begun"})["update_id"]
        for _ in range(2):
            training.do("step")
            update(trainer, training, group, update_id=update_id)
        trainer.done(f"/{end}_weights_update", {"update_id": update_id})
        assert (trainer.checksum() == before) == (end == "abort")
    check(trainer, training)
    leave(trainer, training, group)
    trainer.restore()


MISTAKES: dict[str, Callable[[dict[str, Any]], tuple[dict[str, Any], int, str]]] = {
    "a name": lambda body: ({"names": ["nobody", *body["names"][1:]]}, 400, "nobody"),
    "a shape": lambda body: ({"shapes": [[3, 5, 7], *body["shapes"][1:]]}, 400, body["names"][0]),
    "a negative shape": lambda body: ({"shapes": [[-1], *body["shapes"][1:]]}, 400, body["names"][0]),
    "a shape beyond all memory": lambda body: ({"shapes": [[1 << 50], *body["shapes"][1:]]}, 400, body["names"][0]),
    "a kind of dtype": lambda body: ({"dtypes": ["int32", *body["dtypes"][1:]]}, 400, "int32"),
    "no dtype": lambda body: ({"dtypes": ["nn", *body["dtypes"][1:]]}, 400, "nn"),
    "lists of other lengths": lambda body: ({"shapes": body["shapes"][1:]}, 400, "equal lengths"),
    "a name twice": lambda body: ({"names": [body["names"][1], *body["names"][1:]]}, 400, "twice"),
    "a module": lambda body: ({"target_modules": ["unet"]}, 400, "unet"),
}


IN_EVERY_RUN = ("a name", "a shape", "no dtype", "lists of other lengths", "a module")


@pytest.mark.parametrize("mistake", MISTAKES if NIGHTLY else IN_EVERY_RUN)
def test_what_does_not_fit_is_refused_by_name_and_the_trainer_does_not_wait_for_ever(
    mistake: str, trainer: Trainer, training: TrainingProcess
) -> None:
    group = join(trainer, training)
    changes, status, named = MISTAKES[mistake](training.do("announced"))
    with soon(), broadcasting(trainer, training, group, **changes) as answer:
        assert (answer.result().status_code, answer.result().json()["success"]) == (status, False)
        assert named in answer.result().json()["message"]
        assert f"{group!r} is closed" in answer.result().json()["message"]
        with pytest.raises(RuntimeError):
            training.answer()
    training.do("leave", group=group)
    assert "nothing was done" in trainer.done("/destroy_weights_update_group", {"group_name": group})["message"]


@pytest.mark.parametrize("changes", [{"names": None}, {"surplus": 1}, {"target_modules": ["transformer", "vae"]}])
def test_a_body_that_cannot_be_read_ends_the_group_that_it_names(
    changes: dict[str, Any], alone: Trainer, training: TrainingProcess
) -> None:
    group = join(alone, training)
    with broadcasting(alone, training, group, **changes) as answer:
        assert answer.result().status_code in (400, 422)
        with pytest.raises(RuntimeError):
            training.answer()
    training.do("leave", group=group)


def test_a_master_that_accepts_and_says_nothing_holds_up_nobody_and_the_join_can_be_destroyed(trainer: Trainer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, ThreadPoolExecutor(1) as pool:
        body = asked(trainer, "silent", master_port=silent.getsockname()[1], timeout_s=60)
        answer = pool.submit(trainer.post, "/init_weights_update_group", body)
        connections = [silent.accept()[0] for _ in range(members(trainer))]
        trainer.draw()
        trainer.checksum()
        assert not answer.done()
        trainer.done("/destroy_weights_update_group", {"group_name": "silent"})
        assert (answer.result().status_code, "destroyed" in answer.result().json()["message"]) == (409, True)
        for connection in connections:
            while connection.recv(4096):  # until the rank has closed it
                pass
            connection.close()


def test_a_trainer_that_dies_in_the_middle_has_changed_nothing(trainer: Trainer, checkpoint: Path) -> None:
    with TrainingProcess(checkpoint) as mortal:
        group = join(trainer, mortal)
        mortal.do("step")
        with soon(), broadcasting(trainer, mortal, group, tensors=9) as answer:
            mortal.answer()
            assert not answer.done()
            mortal.process.kill()
            assert answer.result().status_code == 503
            assert "did not arrive" in answer.result().json()["message"]


def test_a_trainer_that_falls_silent_in_the_middle_is_waited_for_no_longer_than_the_timeout(
    trainer: Trainer, training: TrainingProcess
) -> None:
    group = join(trainer, training, timeout_s=SOON_S)
    with soon(), broadcasting(trainer, training, group, tensors=9) as answer:
        assert answer.result().status_code == 503
        assert f"{group!r} is closed" in answer.result().json()["message"]
        training.answer()
    training.do("leave", group=group)


def test_a_group_that_is_not_there_can_be_destroyed_and_not_be_used(
    trainer: Trainer, training: TrainingProcess
) -> None:
    assert "nothing was done" in trainer.done("/destroy_weights_update_group", {"group_name": "nobodys"})["message"]
    answer = trainer.post("/update_weights_from_distributed", training.do("announced") | {"group_name": "nobodys"})
    assert (answer.status_code, "nobodys" in answer.json()["message"]) == (400, True)


def test_a_second_group_of_a_name_is_refused_and_the_first_goes_on(trainer: Trainer, training: TrainingProcess) -> None:
    group = join(trainer, training)
    with soon():
        assert trainer.post("/init_weights_update_group", asked(trainer, group)).status_code == 409
    update(trainer, training, group)
    leave(trainer, training, group)
    trainer.restore()


def test_a_world_that_others_do_not_come_to_is_an_error_in_words_and_the_name_stays_free(
    trainer: Trainer, training: TrainingProcess
) -> None:
    body = asked(trainer, "lonely", timeout_s=SOON_S, world_size=2 + members(trainer))
    training.send("join", port=body["master_port"], world_size=body["world_size"], group="lonely", timeout_s=SOON_S)
    with soon():
        answer = trainer.post("/init_weights_update_group", body)
        assert (answer.status_code, "could not be joined" in answer.json()["message"]) == (503, True), answer.text
        with pytest.raises(RuntimeError):
            training.answer()
    leave(trainer, training, join(trainer, training, "lonely"))


def test_nobody_at_the_address_is_an_error_in_words(trainer: Trainer) -> None:
    with soon():
        answer = trainer.post("/init_weights_update_group", asked(trainer, "nobodys", timeout_s=1))
    assert (answer.status_code, "could not be joined" in answer.json()["message"]) == (503, True)


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"world_size": 1 + 1}, "world_size"), ({"backend": "nccl"}, "backend"), ({"timeout_s": 61}, "timeout_s")],
)
def test_a_group_that_cannot_be_is_refused_at_once(changes: dict[str, Any], named: str, divided: Trainer) -> None:
    with soon(2):
        answer = divided.post("/init_weights_update_group", asked(divided, "cannot be", **changes))
    assert (answer.status_code, answer.json()["error"]["field"]) == (400, named)


def test_a_member_that_dies_ends_the_group_and_a_new_one_has_all(divided: Trainer, training: TrainingProcess) -> None:
    before = divided.checksum()
    group = join(divided, training, timeout_s=SOON_S)
    os.kill(divided.rank_processes(1)[1].pid, signal.SIGKILL)
    divided.wait_lost(1)
    divided.wait_all_ready()
    with soon(), broadcasting(divided, training, group) as answer:
        assert answer.result().status_code in (400, 503)
        assert divided.checksum() == before
        with pytest.raises(RuntimeError):
            training.answer()
    training.do("leave", group=group)
    group = join(divided, training)
    update(divided, training, group)
    check(divided, training)
    leave(divided, training, group)
