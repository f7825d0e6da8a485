"""The steps of an operation, who does them, and the one answer that the server gets."""

import pytest
from msgspec.structs import replace

from safelight.protocol.config import Config
from safelight.protocol.errors import Internal
from safelight.protocol.operations import (
    Abort,
    Begin,
    Commit,
    Continue,
    Digests,
    Flush,
    Operation,
    Pause,
    Sleep,
    Update,
    Wake,
)
from safelight.protocol.replicas import Status
from safelight.protocol.reports import Operated
from safelight.protocol.tensor_sources import Files
from safelight.tests.scheduler.operating import REFUSED, TWO, Operating, update

JOURNAL = Config(replicas=2, weights_journal="/journal")


def test_no_replica_goes_a_step_further_before_all_have_done_the_one_before() -> None:
    stage = Operating()
    stage.operate("u", update(version="named"))
    for step in ("prepare", "write", "commit"):
        assert [order.step for _, order in stage.ordered[-2:]] == [step, step]
        stage.do(1)
        assert stage.unanswered("u")
        assert stage.steps(1)[-1] == step, "it waits for the other"
        stage.do(0)
    assert [stage.steps(number) for number in (0, 1)] == [["prepare", "write", "commit"]] * 2
    assert stage.done("u").weight_version == "named"
    assert sorted(stage.done("u").reports) == [0, 1]
    assert stage.replica(0).model == stage.replica(1).model
    assert stage.weights() == {0: "new", 1: "new"}


def test_the_version_is_published_before_the_reply_to_its_update() -> None:
    """Otherwise a client that asks for the version at once could get the previous one."""
    stage = Operating()
    stage.wait(0.0)
    stage.operate("u", update(version="named"))
    stage.up_to("commit")
    for number, process in stage.processes.items():  # both come before the scheduler's next turn
        stage.dispatcher.from_worker(number, process.perform(process.orders.popleft()), stage.now)
    stage.wait(0.0)
    status, operated = stage.to_server[-2:]
    assert isinstance(operated, Operated)
    assert isinstance(status, Status)
    assert [replica.model.weight_version for replica in status.replicas if replica.model] == ["named"] * 2


def test_the_operation_comes_with_the_first_step_and_the_version_with_those_that_keep_it() -> None:
    stage = Operating(config=JOURNAL)
    stage.operate("u", update())
    stage.do_all()
    orders = [order for to, order in stage.ordered if to == 0]
    assert [(order.step, order.operation is not None, order.weight_version) for order in orders] == [
        ("prepare", True, None), ("write", False, None), ("journal", False, "1"), ("commit", False, "1"),
    ]  # fmt: skip
    assert len({order.number for order in orders}) == 1


def test_steps_for_one_replica_are_done_exactly_once() -> None:
    stage = Operating(replicas=3, config=Config(replicas=3, weights_journal="/journal"))
    stage.begin()
    operations: list[Operation] = [update(part_of="u"), Commit("u"), Digests(), Flush(), update(), Sleep(["caches"])]
    for number, operation in enumerate(operations):
        stage.operate(f"{number}", operation)
        stage.do_all()
        stage.done(f"{number}")
    reported: dict[tuple[int, str], list[bool]] = {}
    for _, order in stage.ordered:
        reported.setdefault((order.number, order.step), []).append(order.is_primary)
    assert len(reported) == 2 + 2 + 1 + 1 + 4 + 1
    assert all(primaries.count(True) == 1 for primaries in reported.values())
    assert all(len(primaries) == (1 if step == "journal" else 3) for (_, step), primaries in reported.items())


@pytest.mark.parametrize("refuses", [0, 1])
def test_a_refused_part_is_released_everywhere_and_the_reply_says_what_was_wrong(refuses: int) -> None:
    stage = Operating()
    stage.operate("u", update())
    stage.do(refuses, REFUSED)
    stage.do(1 - refuses)
    assert [stage.steps(number) for number in (0, 1)] == [["prepare", "release"]] * 2
    assert stage.refusal("u") == REFUSED.message
    stage.do_all()
    assert not any(process.open for process in stage.processes.values())
    stage.operate("again", update(version="again"))
    stage.do_all()
    assert stage.done("again").weight_version == "again"


@pytest.mark.parametrize("step", ["write", "journal"])
def test_a_step_that_fails_after_the_write_is_undone_everywhere(step: str) -> None:
    stage = Operating(config=JOURNAL)
    stage.operate("u", update())
    stage.up_to(step)
    stage.do(0, Internal("The journal could not be written: No space left on device."))
    stage.do_all()
    assert [stage.steps(number)[-1] for number in (0, 1)] == ["rollback", "rollback"]
    assert "journal" in stage.refusal("u")
    assert stage.weights() == {0: "checkpoint", 1: "checkpoint"}
    assert stage.replica().model is not None
    stage.operate("d", Digests())
    stage.do_all()
    assert stage.done("d").weight_version == "0"


def test_the_answer_to_two_refusals_is_the_one_of_the_first_replica() -> None:
    stage = Operating()
    stage.operate("u", update())
    stage.do(1, Internal("the second's"))
    stage.do(0, REFUSED)
    assert stage.refusal("u") == REFUSED.message


def test_an_update_without_a_tensor_makes_no_version() -> None:
    stage = Operating()
    stage.operate("u", Update(source=Files({}), weight_version="made up"))
    stage.do_all()
    assert stage.done("u").weight_version == "0"
    assert stage.steps(0) == ["prepare", "write"]


def test_versions_count_on_from_numbers_and_from_the_commits_after_names() -> None:
    stage = Operating()
    given = [None, None, "41", None, "a name", None, None]
    for number, version in enumerate(given):
        stage.operate(f"{number}", update(version=version))
        stage.do_all()
    found = [stage.done(f"{number}").weight_version for number in range(len(given))]
    assert found == ["1", "2", "41", "42", "a name", "6", "7"]


def test_an_operation_without_a_replica_is_refused_with_the_reasons() -> None:
    stage = Operating(ready=0, config=TWO)
    stage.operate("d", Digests())
    assert "replica 0 is starting" in stage.refusal("d")
    stage.operate("b", Begin(update_id="b"))
    assert "No replica is ready" in stage.refusal("b")
    stage.start(0)
    stage.operate("after", Digests())
    stage.do_all()
    stage.done("after")


def test_answers_to_steps_that_are_over_change_nothing() -> None:
    stage = Operating()
    stage.operate("u", update())
    first = stage.processes[0].orders[0]
    stage.do(0)
    stage.do(1)
    stage.worker(0, stage.processes[0].perform(first))
    stage.worker(1, stage.processes[1].perform(first))
    assert stage.steps(0) == ["prepare", "write"]


def test_a_part_of_an_update_that_never_was_is_refused() -> None:
    stage = Operating()
    operations: dict[str, Operation] = {"u": update(part_of="x"), "c": Commit("x"), "a": Abort("x")}
    for name, operation in operations.items():
        stage.operate(name, operation)
        assert "'x'" in stage.refusal(name)
    assert stage.ordered == []


class Turning(Operating):
    """A stage on which each message has a turn of its own, as in the scheduler's loop."""

    def _collect(self) -> None:
        self.dispatcher.turn(self.now)
        super()._collect()


@pytest.mark.parametrize(
    ("changes", "halted"),
    [
        ([Sleep(["transformer", "vae"])], "asleep"),
        ([Sleep(["transformer", "vae"]), Wake(["transformer", "vae"])], None),
        ([Sleep(["transformer", "vae", "caches"]), Wake(["transformer", "vae"])], "asleep"),
        ([Pause], "paused"),
        ([Pause, Continue], None),
    ],
)
def test_the_reply_to_sleep_wake_or_pause_has_the_state_that_it_made(
    changes: list[Sleep | Wake | type[Pause | Continue]], halted: str | None
) -> None:
    """Else ``/health`` says for another second what was before."""
    stage = Turning(replicas=1)
    for number, change in enumerate(changes):
        if isinstance(change, Sleep | Wake):
            stage.operate(f"{number}", change)
            stage.do_all()
        else:
            stage.server(change(f"{number}"))
    answer = next(message for message in stage.sent(Operated) if message.request_id == f"{len(changes) - 1}")
    reported = [message for message in stage.to_server if isinstance(message, Status) or message is answer]
    statuses = reported[: reported.index(answer)]
    assert isinstance(statuses[-1], Status)
    assert statuses[-1].halted == halted


def test_replicas_that_were_given_different_tensors_write_none_of_them() -> None:
    """A list of GPU handles for each rank, or a file that changes meanwhile: every rank of a replica may agree, and
    another replica hold other tensors."""
    stage = Operating()
    stage.operate("torn", update("new"))
    for number in (0, 1):
        order = stage.processes[number].orders.popleft()
        done = stage.processes[number].perform(order)
        stage.worker(number, replace(done, report=replace(done.report, given=f"what {number} was given")))
    stage.do_all()
    assert "replica 1 was given other tensors than replica 0" in stage.refusal("torn")
    assert stage.weights() == dict.fromkeys((0, 1), "checkpoint")
    assert stage.steps(0) == stage.steps(1) == ["prepare", "release"]
