"""Order among requests, updates, pauses and sleep: nothing is drawn by weights that it did not ask for."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from safelight.tests.effort import chosen

from .trainer import DRAWING, Trainer, changed, transformer

LONG_STEPS = {1: 400, 2: 150}
"""Steps that take some seconds, by number of ranks."""


@pytest.fixture(autouse=True)
def _restored(trainer: Trainer) -> Iterator[None]:
    yield
    trainer.done("/continue_generation", {})
    trainer.done("/resume_memory_occupation", {})
    trainer.restore()


@contextmanager
def in_the_background() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


def running(trainer: Trainer) -> int:
    found: int = httpx.get(f"{trainer.server.url}/server_info").json()["running"]
    return found


def queued(trainer: Trainer) -> int:
    found: int = httpx.get(f"{trainer.server.url}/server_info").json()["queued"]
    return found


def long(trainer: Trainer) -> dict[str, Any]:
    return {"num_inference_steps": LONG_STEPS[trainer.ranks]}


def drawing(trainer: Trainer, **changes: Any) -> httpx.Response:
    return trainer.post("/generate", DRAWING | changes)


def watched(trainer: Trainer, drawing: threading.Event) -> tuple[str, dict[str, Any]]:
    """The name and the data of the last event of a drawing that takes seconds; ``drawing`` says that it has begun."""
    body = DRAWING | long(trainer) | {"stream": True}
    with httpx.stream("POST", f"{trainer.server.url}/generate", json=body, timeout=120) as answer:
        name, data = "", ""
        for line in answer.iter_lines():
            field, _, value = line.partition(": ")
            name, data = (value if field == "event" else name), (value if field == "data" else data)
            if (field, value) == ("event", "progress"):
                drawing.set()
    return name, json.loads(data)


@contextmanager
def one_that_runs(trainer: Trainer) -> Iterator[Future[tuple[str, dict[str, Any]]]]:
    """A drawing that has begun."""
    begun = threading.Event()
    with in_the_background() as pool:
        request = pool.submit(watched, trainer, begun)
        assert begun.wait(60)
        yield request


def test_waiting_lets_what_came_before_end_with_the_weights_that_it_began_with(trainer: Trainer) -> None:
    version = trainer.draw()["weight_version"]
    with one_that_runs(trainer) as request:
        trainer.update(changed(transformer(trainer.directory)), weight_version="after", mode="wait")
        name, reported = request.result()
        assert (name, reported["weight_versions"]) == ("result", [version])
    assert trainer.draw()["weight_versions"] == ["after"]


def test_aborting_ends_what_came_before(trainer: Trainer) -> None:
    with one_that_runs(trainer) as request:
        trainer.update(changed(transformer(trainer.directory)), weight_version="after", mode="abort")
        name, reported = request.result()
        assert (name, reported["error"]["code"]) == ("error", "conflict")
    assert trainer.draw()["weight_versions"] == ["after"]


def test_in_place_goes_on_and_says_which_weights_it_saw(trainer: Trainer) -> None:
    version = trainer.draw()["weight_version"]
    with one_that_runs(trainer) as request:
        trainer.update(changed(transformer(trainer.directory)), weight_version="during", mode="in_place")
        assert not request.done()
        _, reported = request.result()
    assert (reported["weight_versions"], reported["weight_version"]) == ([version, "during"], "during")


def test_in_place_computes_nothing_with_weights_that_are_not_committed(trainer: Trainer) -> None:
    asked = DRAWING | long(trainer)
    wanted = trainer.done("/generate", asked)["outputs"][0]["b64"]
    new = list(changed(transformer(trainer.directory)).items())
    with one_that_runs(trainer) as request:
        update_id = trainer.done("/begin_weights_update", {"mode": "in_place"})["update_id"]
        for part in (new[::2], new[1::4]):
            trainer.update(dict(part), update_id=update_id)
            time.sleep(0.5)
        assert not request.done()
        trainer.done("/abort_weights_update", {"update_id": update_id})
        assert request.result()[1]["outputs"][0]["b64"] == wanted


def test_requests_behind_an_update_are_drawn_by_its_weights(trainer: Trainer) -> None:
    with one_that_runs(trainer) as first, in_the_background() as pool:
        update = pool.submit(
            trainer.update, changed(transformer(trainer.directory)), weight_version="behind", mode="wait"
        )
        trainer.server.wait_for(lambda: list(trainer.shared().glob("upload-*")) or None, 30)
        later = [pool.submit(drawing, trainer, seed=seed) for seed in range(4)]
        update.result()
        version = first.result()[1]["weight_version"]
        assert version != "behind"
        assert {one.result().json()["weight_version"] for one in later} <= {
            "behind",
            version,  # one that was faster than the update's way to the scheduler
        }


def test_updates_under_steady_generation_fail_no_request_and_no_version_is_made_up(trainer: Trainer) -> None:
    given = {trainer.draw()["weight_version"]} | {f"step-{number}" for number in range(12)}
    stop = threading.Event()

    def client(number: int) -> list[str]:
        seen = []
        for seed in itertools.count():
            if stop.is_set():
                return seen
            answer = drawing(trainer, seed=number * 1000 + seed, deterministic=False)
            assert answer.status_code == 200, answer.text
            seen += answer.json()["weight_versions"]
        return seen

    own = transformer(trainer.directory)
    with in_the_background() as pool:
        clients = [pool.submit(client, number) for number in range(4)]
        for number in range(12):
            mode = ("wait", "in_place")[number % 2]
            trainer.update(changed(own, 0.01 * number), weight_version=f"step-{number}", mode=mode)
            reported = trainer.draw()
            assert reported["weight_versions"] == [f"step-{number}"], "nothing submitted after the reply is older"
        stop.set()
        seen = [client.result() for client in clients]
    assert set(itertools.chain(*seen)) <= given
    for versions in seen:
        order = [version for version, _ in itertools.groupby(versions)]
        assert len(order) == len(set(order)), "a version that is over does not come back"


def test_while_an_update_is_open_requests_wait(trainer: Trainer) -> None:
    update_id = trainer.done("/begin_weights_update", {"weight_version": "open"})["update_id"]
    with in_the_background() as pool:
        request = pool.submit(drawing, trainer)
        trainer.server.wait_for(lambda: queued(trainer) or None, 30)
        trainer.update(changed(transformer(trainer.directory)), update_id=update_id)
        assert not request.done()
        trainer.done("/commit_weights_update", {"update_id": update_id})
        assert request.result().json()["weight_versions"] == ["open"]


def test_two_updates_at_once_are_served_one_after_the_other(trainer: Trainer) -> None:
    own = transformer(trainer.directory)
    with in_the_background() as pool:
        answers = [
            pool.submit(trainer.update, changed(own, 0.1 * number), weight_version=f"at-once-{number}")
            for number in range(4)
        ]
        versions = {answer.result()["weight_version"] for answer in answers}
    assert versions == {f"at-once-{number}" for number in range(4)}
    assert trainer.draw()["weight_version"] in versions


@pytest.mark.parametrize("mode", ["wait", "abort", "in_place"])
def test_a_pause_holds_requests_until_it_ends(mode: str, trainer: Trainer) -> None:
    with one_that_runs(trainer) as before, in_the_background() as pool:
        trainer.done("/pause_generation", {"mode": mode})
        if mode == "in_place":
            assert not before.done()
        else:
            assert before.result(30)[0] == ("error" if mode == "abort" else "result")
        held = pool.submit(drawing, trainer)
        trainer.server.wait_for(lambda: queued(trainer) or None, 30)
        trainer.update(changed(transformer(trainer.directory)), weight_version=f"paused-{mode}")
        assert not held.done()
        trainer.done("/continue_generation", {})
        assert held.result().json()["weight_version"] == f"paused-{mode}"
        assert before.result()[0] == ("error" if mode == "abort" else "result")


def test_asleep_nothing_is_generated_and_weights_are_as_they_were_afterwards(trainer: Trainer) -> None:
    before, picture = trainer.checksum(), trainer.picture()
    assert trainer.done("/release_memory_occupation", {})["sleeping"] is True
    assert drawing(trainer).status_code == 409
    assert trainer.checksum() == before
    assert trainer.done("/resume_memory_occupation", {})["sleeping"] is False
    assert (trainer.checksum(), trainer.picture()) == (before, picture)


WEIGHTS, ALL = ["weights"], ["weights", "caches"]


@pytest.mark.parametrize(
    ("how", "tags"),
    chosen(
        ("update", WEIGHTS), ("begun", WEIGHTS), ("aborted", WEIGHTS), ("aborted", ALL),
        nightly=[("update", ALL), ("begun", ALL)],
    ),
)  # fmt: skip
def test_an_update_of_sleeping_weights_is_there_when_they_wake(how: str, tags: list[str], trainer: Trainer) -> None:
    new = changed(transformer(trainer.directory))
    trainer.update(new)
    wanted, picture = trainer.checksum(), trainer.picture()
    trainer.restore()
    before = trainer.checksum()
    trainer.done("/release_memory_occupation", {"tags": tags})
    if how == "update":
        trainer.update(new)
    else:
        update_id = trainer.done("/begin_weights_update", {})["update_id"]
        trainer.update(new, update_id=update_id)
        end = "commit" if how == "begun" else "abort"
        trainer.done(f"/{end}_weights_update", {"update_id": update_id})
    trainer.done("/resume_memory_occupation", {"tags": tags})
    assert trainer.checksum() == (before if how == "aborted" else wanted)
    assert (trainer.picture() == picture) == (how != "aborted")


def test_an_operator_ends_one_request_or_all(trainer: Trainer) -> None:
    body = DRAWING | long(trainer) | {"stream": True}
    with in_the_background() as pool:
        other = pool.submit(drawing, trainer, **long(trainer))
        with httpx.stream("POST", f"{trainer.server.url}/generate", json=body, timeout=60) as named:
            trainer.done("/abort_request", {"request_id": named.headers["x-safelight-id"]})
            assert "conflict" in named.read().decode()
        assert not other.done()
        trainer.done("/abort_request", {"all": True})
        assert other.result().status_code == 409


def test_the_reply_to_a_partial_wake_says_whether_the_rest_sleeps(trainer: Trainer) -> None:
    trainer.done("/release_memory_occupation", {})
    assert trainer.done("/resume_memory_occupation", {"tags": ["weights"]})["sleeping"] is True
    assert trainer.done("/resume_memory_occupation", {"tags": ["caches"]})["sleeping"] is False


def test_health_says_that_a_server_sleeps(trainer: Trainer) -> None:
    """At once: a trainer that has its answer asks nobody twice."""
    for call, sleeps in (("release", True), ("resume", False)) * 3:
        trainer.done(f"/{call}_memory_occupation", {})
        assert ("asleep" in httpx.get(f"{trainer.server.url}/health").text) == sleeps
