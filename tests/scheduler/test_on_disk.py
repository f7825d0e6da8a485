"""Weights that came from files are read again when nobody has them: as they were, and if files alone made them."""

from __future__ import annotations

import pytest

from safelight.protocol.config import Config
from safelight.protocol.errors import InvalidRequest
from safelight.protocol.operations import Update
from safelight.protocol.reports import Operated
from safelight.protocol.tensor_sources import Files
from safelight.tests.scheduler.operating import Operating, update


def from_disk(word: str, module: str = "transformer", stamp: int = 1, part_of: str | None = None) -> Update:
    """As :func:`update`, but from a file of that name."""
    return Update(source=Files({module: [word]}, stamps={word: [stamp]}), update_id=part_of, weight_version=word)


def done(stage: Operating, *updates: Update) -> list[Operated]:
    for number, one in enumerate(updates):
        stage.operate(f"{number}", one)
        stage.do_all()
    return [stage.done(f"{number}") for number in range(len(updates))]


def restarted(stage: Operating) -> None:
    stage.kill(0)
    stage.start(0)
    stage.do_all()


def test_a_replica_reads_again_what_came_from_disk_before_it_serves() -> None:
    stage = Operating(replicas=1)
    done(stage, from_disk("new"), from_disk("other", "vae"))
    restarted(stage)
    assert (stage.weights(), stage.weights("vae"), stage.serving()) == ({0: "new"}, {0: "other"}, [0])
    model = stage.replica(0).model
    assert model is not None
    assert model.weight_version == "other"


def test_the_others_get_it_from_the_first_that_has_read_it() -> None:
    stage = Operating()
    done(stage, from_disk("new"))
    stage.kill(0)
    stage.kill(1)
    for number in (0, 1):
        stage.start(number)
        stage.do_all()
    assert (stage.weights(), stage.serving()) == ({0: "new", 1: "new"}, [0, 1])
    assert stage.steps(0).count("prepare") == 3, "it was updated, read again, and gave"


def test_parts_are_read_in_their_order_over_what_they_were_written_over() -> None:
    stage = Operating(replicas=1)
    done(stage, from_disk("new"), from_disk("half a", stamp=2), from_disk("half b", stamp=3))
    stage.kill(0)
    stage.start(0)
    (order,) = stage.processes[0].orders
    files = Files(
        {"transformer": ["new", "half a", "half b"]},
        stamps={"new": [1], "half a": [2], "half b": [3]},
        overlay=True,
    )
    assert order.operation == Update(source=files, weight_version="half b")


@pytest.mark.parametrize(
    "updates",
    [
        [update("sent")],
        [from_disk("new"), update("half sent")],
        [update("sent"), from_disk("half a")],
        [from_disk("new"), update("sent", "vae")],
        [from_disk("half a", stamp=1), from_disk("half a", stamp=2)],
    ],
    ids=["sent", "sent over a file", "a file over what was sent", "another module was sent", "a file was replaced"],
)
def test_what_files_alone_do_not_make_waits_to_be_sent_again(updates: list[Update]) -> None:
    stage = Operating(replicas=1)
    done(stage, *updates)
    restarted(stage)
    assert stage.serving() == []
    assert "were lost" in stage.replica(0).message
    assert stage.steps(0)[-1] == "commit", "nothing was tried"


def test_a_whole_module_from_disk_makes_up_for_what_was_sent_before() -> None:
    stage = Operating(replicas=1)
    done(stage, update("sent"), from_disk("new"))
    restarted(stage)
    assert (stage.weights(), stage.serving()) == ({0: "new"}, [0])


def test_a_file_that_has_changed_is_not_read_in_place_of_what_it_was() -> None:
    stage = Operating(replicas=1)
    done(stage, from_disk("new"))
    stage.kill(0)
    stage.start(0)
    stage.do(0, InvalidRequest("The file new cannot be used: it has changed since it was named."))
    stage.do_all()
    assert (stage.weights(), stage.serving()) == ({0: "checkpoint"}, [])
    assert "were lost" in stage.replica(0).message
    restarted(stage)
    assert stage.steps(0)[-1] == "release", "it is not tried again"


def test_a_journal_stands_for_it() -> None:
    """A replica may begin with a journal that has missed a commit, and not with the checkpoint."""
    stage = Operating(replicas=1, config=Config(replicas=1, weights_journal="/journal"))
    done(stage, from_disk("half a"))
    restarted(stage)
    assert stage.serving() == []


def test_an_update_that_leaves_the_server_unable_to_serve_says_so() -> None:
    stage = Operating(replicas=1)
    (first, second) = done(stage, update("sent"), update("sent", "vae"))
    assert (first.unable, second.unable) == (None, None)
    restarted(stage)
    stage.operate("only one", update("again", "vae"))
    stage.do_all()
    unable = stage.done("only one").unable
    assert unable is not None
    assert "update transformer again" in unable
    stage.operate("the other", update("again"))
    stage.do_all()
    assert stage.done("the other").unable is None
    assert stage.serving() == [0]
