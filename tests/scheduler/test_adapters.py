"""Changes of adapters: everywhere or nowhere, listed as committed, and sent to replicas that join later."""

import pytest
from msgspec.structs import replace

from safelight.protocol.adapters import (
    AdapterChange,
    AdapterState,
    MergeAdapters,
    RestoreAdapters,
    SetAdapters,
    UnloadAdapter,
    UnmergeAdapters,
)
from safelight.protocol.config import Config
from safelight.protocol.errors import Internal
from safelight.protocol.operations import Abort, Adapt, Digests, ListAdapters, Sleep, Wake
from safelight.tests.scheduler.adapting import adapted, set_adapters, words
from safelight.tests.scheduler.operating import Operating, Process, update
from safelight.tests.scheduler.stage import generate, result

INK = set_adapters("ink", words=["black"])
FULL = Internal("There is no room.")
JOURNAL = Config(replicas=2, weights_journal="/journal")


def change(
    stage: Operating, name: str, what: AdapterChange, *, publishes: bool = False, version: str | None = None
) -> None:
    stage.operate(name, Adapt(what, publishes, version))
    stage.do_all()
    stage.done(name)


def listed(stage: Operating) -> AdapterState:
    name = f"list {len(stage.to_server)}"
    stage.server(ListAdapters(name))
    return stage.done(name).adapters


def alike(stage: Operating) -> bool:
    """True if all replicas serve the same weights of the same version, and the listed adapters."""
    stage.do_all()
    first = next(iter(stage.processes.values()))
    state = listed(stage)
    return stage.serving() == sorted(stage.processes) and all(
        (one.version, one.weights, one.adapters, one.applied) == (first.version, first.weights, state, state)
        for one in stage.processes.values()
    )


def restored(stage: Operating, number: int) -> list[AdapterState]:
    """With which adapters a replica was brought to those of the others, each time."""
    operations = [order.operation for to, order in stage.ordered if to == number and order.operation is not None]
    changes = [operation.change for operation in operations if isinstance(operation, Adapt)]
    return [one.state for one in changes if isinstance(one, RestoreAdapters)]


def test_a_change_has_the_steps_of_an_update_and_each_waits_for_all() -> None:
    stage = Operating()
    stage.operate("set", Adapt(INK))
    for step in ("prepare", "write", "commit"):
        stage.up_to(step)
        assert [process.orders[0].step for process in stage.processes.values()] == [step, step]
        assert listed(stage) == AdapterState()
        stage.do(1)
        assert not stage.processes[1].orders, "the other has not done it"
    stage.do_all()
    reported = stage.done("set")
    assert words(reported.adapters) == {"ink": "black"}
    assert (listed(stage), reported.weight_version, sorted(reported.reports)) == (reported.adapters, "0", [0, 1])
    assert stage.steps(0) == stage.steps(1) == ["prepare", "write", "commit"]
    assert alike(stage)


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize(("step", "undone"), [("prepare", "release"), ("write", "rollback")])
def test_what_one_replica_cannot_do_no_other_has_done(step: str, undone: str, who: int) -> None:
    stage = Operating()
    change(stage, "set", INK)
    before = listed(stage)
    stage.operate("set another", Adapt(set_adapters("oil", words=["red"]), publishes=True))
    stage.up_to(step)
    stage.do(who, FULL)
    stage.do_all()
    assert stage.refusal("set another") == FULL.message
    assert stage.steps(0)[-1] == stage.steps(1)[-1] == undone
    assert listed(stage) == before
    assert alike(stage)
    assert stage.processes[0].version == "0"


def test_an_impossible_change_is_refused_and_evicts_nothing() -> None:
    stage = Operating()
    change(stage, "set", INK)
    stage.operate("unload", Adapt(UnloadAdapter("oil")))
    stage.do_all()
    assert "oil" in stage.refusal("unload")
    assert stage.adapters() == {0: {"ink": "black"}, 1: {"ink": "black"}}


@pytest.mark.parametrize("answered", [False, True])
@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("step", ["prepare", "write"])
def test_a_loss_before_the_commit_leaves_the_others_as_they_were(step: str, who: int, answered: bool) -> None:
    stage = Operating(replicas=3)
    stage.operate("set", Adapt(INK, publishes=True))
    stage.up_to(step)
    if answered:
        stage.do(who)
    stage.kill(who)
    assert stage.unanswered("set"), "the others have not said that they did nothing"
    stage.do_all()
    assert f"Replica {who} was lost" in stage.refusal("set")
    assert listed(stage) == AdapterState()
    stage.start(who)
    assert alike(stage)
    assert stage.adapters() == {0: {}, 1: {}, 2: {}}


@pytest.mark.parametrize("answered", [False, True])
@pytest.mark.parametrize("who", [0, 1])
def test_a_loss_in_the_commit_is_made_good_when_the_replica_comes_back(who: int, answered: bool) -> None:
    stage = Operating()
    stage.operate("set", Adapt(INK, publishes=True))
    stage.up_to("commit")
    if answered:
        stage.do(who)
    stage.kill(who)
    stage.do_all()
    assert list(stage.done("set").reports) == [1 - who]
    stage.start(who)
    assert stage.serving() == [1 - who]
    assert alike(stage)
    assert stage.processes[who].version == "1"


def test_a_change_that_all_replicas_are_lost_with_is_never_reported_as_done() -> None:
    stage = Operating()
    change(stage, "set", INK)
    before = listed(stage)
    stage.operate("set another", Adapt(set_adapters("oil", words=["red"]), publishes=True))
    stage.up_to("commit")
    stage.do(0)
    stage.kill(0)
    stage.kill(1)
    assert "lost" in stage.refusal("set another")
    stage.start(0)
    stage.start(1)
    assert alike(stage)
    assert listed(stage) == before
    assert stage.processes[0].version == "0"


@pytest.mark.parametrize("step", ["prepare", "write", "commit"])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("ends", [False, True])
def test_what_comes_while_a_change_is_made_serves_what_it_leaves(step: str, before: bool, ends: bool) -> None:
    stage = Operating(ready=1)
    if before:
        change(stage, "set", INK)
    stage.operate("change", Adapt(set_adapters("oil", words=["red"])))
    stage.up_to(step)
    stage.start(1)
    assert stage.serving() == [0]
    if not ends and step != "commit":
        stage.do(0, FULL)
    assert alike(stage)
    assert ("oil" in stage.adapters()[1]) == (ends or step == "commit")


def test_what_comes_later_gets_the_adapters_before_it_serves() -> None:
    stage = Operating(replicas=3, ready=2)
    change(stage, "set", INK)
    change(stage, "merge", MergeAdapters())
    stage.kill(1)
    for number in (1, 2):
        stage.start(number)
    for number in (1, 2):
        for step in ("prepare", "write", "commit"):
            assert number not in stage.serving()
            assert stage.do(number).step == step
        assert number in stage.serving()
    assert restored(stage, 1) == restored(stage, 2) == [listed(stage)]
    assert alike(stage)
    assert stage.steps(0) == ["prepare", "write", "commit"] * 2, "nobody asked it for weights"


def test_weights_that_were_updated_come_before_the_adapters_and_both_before_it_serves() -> None:
    stage = Operating()
    stage.operate("u", update())
    stage.do_all()
    change(stage, "set", INK)
    stage.kill(1)
    stage.start(1)
    while stage.processes[0].orders or stage.processes[1].orders:
        assert stage.serving() == [0]
        stage.do(0 if stage.processes[0].orders else 1)
    assert alike(stage)
    assert stage.weights() == {0: "new", 1: "new"}


@pytest.mark.parametrize("step", ["prepare", "write"])
def test_a_replica_that_cannot_be_given_the_adapters_has_failed_and_holds_up_nobody(step: str) -> None:
    """The supervisor starts it again then."""
    stage = Operating()
    change(stage, "set", INK)
    stage.kill(1)
    stage.start(1)
    while stage.processes[1].orders[0].step != step:
        stage.do(1)
    stage.do(1, FULL)
    stage.do_all()
    assert (stage.replica(1).state, stage.serving()) == ("failed", [0])
    assert "no room" in stage.replica(1).message
    stage.server(generate("served"))
    assert stage.started() == [("served", 0)]
    stage.kill(1)
    stage.start(1)
    assert alike(stage)


def test_an_operation_is_not_for_a_replica_that_could_not_be_given_the_adapters() -> None:
    """It is about to be ended, and what it takes part in would fail with it."""
    stage = Operating(replicas=2, ready=0, adapters=INK)
    stage.start(0)
    stage.operate("digests", Digests())
    stage.start(1)
    stage.do(0, FULL)
    stage.kill(0)
    stage.do_all()
    assert list(stage.done("digests").reports) == [1]
    assert alike(stage)


def test_an_operation_is_refused_when_no_replica_could_be_given_the_adapters() -> None:
    """It would wait until the last of them ends."""
    stage = Operating(replicas=1, ready=0, adapters=INK)
    stage.start(0)
    stage.operate("digests", Digests())
    stage.do(0, FULL)
    assert "no room" in stage.refusal("digests")


def test_a_replica_that_could_not_be_given_the_adapters_is_not_given_them_again() -> None:
    """It has two turns: it waited for its adapters, and for weights that were lost."""
    stage = one_without_the_weights()
    stage.operate("again", update("again"))
    stage.up_to("commit")
    stage.do(0)
    assert isinstance(stage.processes[0].orders[0].operation, Adapt)
    stage.do(0, FULL)
    stage.do_all()
    assert stage.replica(0).state == "failed"
    assert stage.steps(0)[-2:] == ["prepare", "release"]


@pytest.mark.parametrize("step", ["prepare", "write", "commit"])
def test_a_replica_that_is_lost_while_it_gets_the_adapters_comes_back_for_another_try(step: str) -> None:
    stage = Operating()
    change(stage, "set", INK)
    stage.kill(1)
    stage.start(1)
    while stage.processes[1].orders[0].step != step:
        stage.do(1)
    stage.kill(1)
    stage.operate("after", Digests())
    stage.do_all()
    assert sorted(stage.done("after").reports) == [0]
    stage.start(1)
    assert alike(stage)


def test_adapters_outlive_all_replicas() -> None:
    """The weights that they are for are the checkpoint's, which every process has."""
    stage = Operating()
    change(stage, "set", INK, publishes=True)
    stage.kill(0)
    stage.kill(1)
    stage.start(1)
    assert words(listed(stage)) == {"ink": "black"}
    stage.start(0)
    assert alike(stage)
    assert stage.processes[0].version == "1"


def one_without_the_weights() -> Operating:
    """Adapters and weights were given to two replicas, and of those one has come back: nobody has the weights."""
    stage = Operating()
    change(stage, "set", INK)
    stage.operate("u", update())
    stage.do_all()
    stage.kill(0)
    stage.kill(1)
    stage.start(0)
    stage.do_all()
    return stage


def test_a_change_is_refused_while_no_replica_has_the_weights() -> None:
    stage = one_without_the_weights()
    stage.operate("unload", Adapt(UnloadAdapter("ink")))
    stage.do_all()
    assert "No replica has the weights" in stage.refusal("unload")
    stage.operate("again", update("again"))
    stage.do_all()
    stage.start(1)
    assert alike(stage)
    assert stage.weights() == {0: "again", 1: "again"}
    assert stage.adapters()[1] == {"ink": "black"}


def test_a_change_is_refused_while_no_replica_is_there() -> None:
    stage = Operating(ready=0)
    stage.operate("set", Adapt(INK))
    assert "No replica is ready" in stage.refusal("set")
    stage.start(0)
    assert stage.serving() == [0]
    assert listed(stage) == AdapterState()


def test_a_server_that_begins_with_adapters_serves_nobody_without_them() -> None:
    stage = Operating(ready=0, adapters=INK)
    for number in (0, 1):
        stage.start(number)
    assert stage.serving() == []
    assert listed(stage) == AdapterState()
    assert alike(stage)
    assert words(listed(stage)) == {"ink": "black"}
    assert restored(stage, 1) == [listed(stage)], "what the first of them decided is decided"
    change(stage, "unload", UnloadAdapter("ink"))
    stage.kill(1)
    stage.start(1)
    assert alike(stage)
    assert stage.adapters() == {0: {}, 1: {}}, "they are begun with once"


def test_a_server_that_begins_with_adapters_tries_them_on_the_next_replica_when_the_first_is_lost() -> None:
    stage = Operating(ready=0, adapters=INK)
    stage.start(0)
    stage.start(1)
    stage.up_to("commit")
    stage.kill(0)
    stage.do_all()
    assert stage.serving() == [1]
    stage.start(0)
    assert alike(stage)
    assert words(listed(stage)) == {"ink": "black"}


def test_a_change_that_publishes_makes_the_next_version_or_the_one_that_it_names() -> None:
    stage = Operating()
    change(stage, "set", INK, publishes=True)
    assert stage.done("set").weight_version == "1"
    change(stage, "merge", MergeAdapters())
    assert stage.done("merge").weight_version == "1", "it publishes nothing"
    change(stage, "again", INK, publishes=True, version="blue")
    assert stage.done("again").weight_version == "blue"
    assert stage.ordered[-6][1].operation == Adapt(replace(INK, recent=["ink"]), True, "blue")
    assert {process.version for process in stage.processes.values()} == {"blue"}
    assert {model.weight_version for n in (0, 1) if (model := stage.replica(n).model)} == {"blue"}


def test_no_two_versions_have_the_same_name_unless_the_trainer_gave_it() -> None:
    stage = Operating()
    versions = ["0"]
    for number, version in enumerate([None, "mine", None, "mine again", None]):
        change(stage, f"change {number}", INK, publishes=True, version=version)
        versions.append(stage.processes[0].version)
    for number, version in enumerate(["yours", None, None]):
        stage.operate(f"update {number}", update(version=version))
        stage.do_all()
        versions.append(stage.processes[0].version)
    assert len(set(versions)) == len(versions), versions


@pytest.mark.parametrize("journal", [False, True])
@pytest.mark.parametrize("unloaded", [False, True])
def test_a_returning_replica_has_the_published_version_though_its_weights_are_of_the_previous_one(
    journal: bool, unloaded: bool
) -> None:
    stage = Operating(config=JOURNAL if journal else None)
    read = {}
    if journal:
        stage.operate("u", update(version="base"))
        stage.do_all()
        read = {"version": "base", "weights": {"transformer": "new", "vae": "checkpoint"}}
    change(stage, "set", INK, publishes=True, version="published")
    if unloaded:
        change(stage, "unload", UnloadAdapter("ink"))
    stage.kill(1)
    reported = len(stage.steps(0))
    stage.start(1, Process(1, 0, **read))
    assert alike(stage)
    assert stage.processes[1].version == "published"
    assert len(stage.steps(0)) == reported, "it has the weights, and nobody is asked for them"


def test_with_a_journal_published_weights_outlive_all_replicas() -> None:
    stage = Operating(config=JOURNAL)
    stage.operate("u", update(version="base"))
    stage.do_all()
    change(stage, "set", INK, publishes=True, version="published")
    stage.kill(0)
    stage.kill(1)
    for number in (0, 1):
        stage.start(number, Process(number, 0, "base", {"transformer": "new", "vae": "checkpoint"}))
    assert alike(stage)
    assert stage.processes[0].version == "published"
    assert stage.weights() == {0: "new", 1: "new"}


def test_a_replica_that_is_brought_up_does_not_journal_the_weights_as_those_with_adapters() -> None:
    """A replica that reads that journal would not count as one that has the weights."""
    stage = Operating(config=JOURNAL)
    stage.operate("u", update(version="base"))
    stage.do_all()
    change(stage, "set", INK, publishes=True, version="published")
    stage.kill(1)
    stage.start(1)  # with a journal that had missed the update
    stage.do_all()
    journalled = [order.weight_version for _, order in stage.ordered if order.step == "journal"]
    assert journalled == ["base", "base"]
    assert alike(stage)
    assert stage.processes[1].version == "published"


def test_weights_that_were_in_doubt_are_not_taken_up_while_another_gets_adapters_on_the_ones_before() -> None:
    stage = Operating(config=JOURNAL)
    change(stage, "set", INK)
    stage.operate("u", update(version="in doubt"))
    stage.up_to("commit")
    stage.kill(0)
    stage.kill(1)
    stage.start(0)  # it read the journal before the commit
    stage.start(1, Process(1, 0, "in doubt", {"transformer": "new", "vae": "checkpoint"}))
    assert alike(stage)


def test_an_update_that_comes_while_adapters_are_brought_leaves_both() -> None:
    stage = Operating()
    change(stage, "set", INK)
    stage.kill(1)
    stage.begin()
    stage.start(1)
    stage.operate("1", update("new", part_of="u"))
    stage.do_all()
    stage.commit()
    assert alike(stage)
    assert stage.weights() == {0: "new", 1: "new"}
    assert stage.adapters() == {0: {"ink": "black"}, 1: {"ink": "black"}}


def test_an_adapter_waits_for_a_begun_update_to_end() -> None:
    stage = Operating()
    stage.begin()
    stage.operate("set", Adapt(INK))
    stage.do_all()
    assert stage.unanswered("set")
    stage.operate("abort", Abort("u"))
    stage.do_all()
    assert words(stage.done("set").adapters) == {"ink": "black"}


def test_a_returning_replica_sleeps_with_the_adapters_of_the_others() -> None:
    stage = Operating()
    change(stage, "set", INK)
    stage.operate("sleep", Sleep(["transformer", "vae"]))
    stage.do_all()
    stage.kill(1)
    stage.start(1)
    assert alike(stage)
    assert stage.processes[1].asleep == {"transformer", "vae"}


def test_a_replica_put_to_sleep_while_it_waits_for_adapters_is_woken_with_the_others() -> None:
    stage = Operating(replicas=3, ready=0, adapters=INK)
    stage.start(0)
    stage.operate("sleep", Sleep(["transformer", "vae"]))
    stage.start(1)
    stage.operate("wake", Wake(["transformer", "vae"]))
    stage.start(2)
    stage.kill(0)  # whose adapters held up the line
    stage.do_all()
    assert stage.done("sleep").reports.keys() == stage.done("wake").reports.keys() == {1, 2}
    assert alike(stage)
    assert not any(process.asleep for process in stage.processes.values())


def test_the_least_recently_used_adapters_are_evicted_first() -> None:
    stage = Operating()
    for name in ("ink", "oil", "wax"):
        change(stage, name, set_adapters(name, words=[name], mode="request"))
    for number, names in enumerate([["oil", "ink"], ["nobody's"], None, ["wax"], ["ink"]]):
        stage.server(generate(str(number), lora=names))
        stage.worker(stage.started()[-1][1], result(str(number)))
    change(stage, "chalk", set_adapters("chalk", words=["chalk"], mode="request"))
    (order, _) = [order for _, order in stage.ordered if order.operation][-2:]
    assert isinstance(order.operation, Adapt)
    assert isinstance(order.operation.change, SetAdapters)
    assert order.operation.change.recent == ["oil", "wax", "ink"]
    assert sorted(words(listed(stage))) == ["chalk", "ink", "wax"]
    assert alike(stage)


def test_an_adapter_that_is_loaded_again_was_not_used_before() -> None:
    stage = Operating()
    for name in ("ink", "oil"):
        change(stage, name, set_adapters(name, words=[name], mode="request"))
    change(stage, "unload", UnloadAdapter("ink"))
    change(stage, "unmerge", UnmergeAdapters())
    change(stage, "again", set_adapters("ink", words=["ink"], mode="request"))
    change(stage, "last", set_adapters("oil", mode="request"))
    change(stage, "wax", set_adapters("wax", words=["wax"], mode="request"))
    recent = [
        order.operation.change.recent
        for to, order in stage.ordered
        if to == 0 and isinstance(order.operation, Adapt) and isinstance(order.operation.change, SetAdapters)
    ]
    assert recent == [[], ["ink"], ["oil"], ["oil", "ink"], ["ink", "oil"]]


def test_what_is_listed_is_what_a_change_comes_to() -> None:
    stage = Operating()
    state = AdapterState()
    for number, one in enumerate([INK, UnmergeAdapters(), MergeAdapters(), UnloadAdapter("ink")]):
        change(stage, str(number), one)
        state = adapted(state, one)
        assert stage.done(str(number)).adapters == listed(stage) == state


def test_weights_that_were_sent_again_are_not_asked_for_once_more_while_adapters_are_brought_to_them() -> None:
    stage = Operating()
    change(stage, "set", INK)
    stage.operate("u", update())
    stage.do_all()
    stage.kill(0)
    stage.kill(1)
    stage.start(0)
    stage.operate("again", update("again"))
    stage.up_to("commit")
    stage.start(1)
    stage.operate("vae", update("newer", "vae"))
    stage.do_all()
    assert stage.done("again").weight_version == "2"
    assert stage.done("vae").weight_version == "3"
    assert alike(stage)
    assert stage.weights() == {0: "again", 1: "again"}


def test_half_of_what_was_updated_is_not_all_for_who_waits_for_its_adapters() -> None:
    stage = Operating(replicas=3, ready=1, adapters=INK)
    stage.do_all()
    stage.begin()
    stage.operate("transformer", update("new"))
    stage.operate("vae", update("newer", "vae"))
    stage.start(1)
    stage.kill(0)  # the begun update ends with it
    stage.up_to("commit")
    stage.start(2)
    stage.do_all()
    assert stage.done("transformer").weight_version == "1"
    assert stage.done("vae").weight_version == "2"
    assert alike(stage)
    assert stage.weights() == {1: "new", 2: "new"}


def test_what_another_replica_still_has_is_not_lost_though_it_waits_for_its_adapters() -> None:
    stage = Operating(replicas=2, config=JOURNAL)
    change(stage, "set", INK)
    stage.operate("u", update(version="base"))
    stage.do_all()
    stage.kill(1)
    stage.begin()
    stage.operate("vae", update("newer", "vae"))
    stage.start(1, Process(1, 0, "base", {"transformer": "new", "vae": "checkpoint"}))
    stage.kill(0)
    stage.do_all()
    assert stage.done("vae")
    assert alike(stage)
    assert (stage.weights(), stage.weights("vae")) == ({1: "new"}, {1: "newer"})


def test_half_of_a_module_can_be_sent_when_one_comes_that_has_the_rest_of_it() -> None:
    stage = Operating(config=JOURNAL)
    change(stage, "set", INK)
    stage.operate("u", update(version="base"))
    stage.do_all()
    stage.kill(0)
    stage.kill(1)
    stage.start(0)  # with a journal that had missed the update
    stage.begin()
    stage.operate("half", update("half"))
    stage.start(1, Process(1, 0, "base", {"transformer": "new", "vae": "checkpoint"}))
    stage.operate("abort", Abort("u"))
    stage.do_all()
    assert stage.done("half")
    assert alike(stage)
    assert stage.weights() == {0: "new and half", 1: "new and half"}


def test_a_new_process_has_no_part_in_a_change_that_its_predecessors_loss_lets_begin() -> None:
    stage = Operating(config=JOURNAL)
    stage.operate("set", Adapt(INK))
    stage.operate("publish", Adapt(set_adapters("oil", words=["red"]), publishes=True))
    stage.do(1)
    stage.start(0)
    stage.do_all()
    stage.refusal("set")
    assert list(stage.done("publish").reports) == [1]
    assert alike(stage)


def test_nobody_serves_half_of_what_was_committed_after_the_one_that_had_it_all_has_failed() -> None:
    stage = Operating()
    change(stage, "set", INK)
    stage.operate("u", update())
    stage.do_all()
    stage.kill(0)
    stage.kill(1)
    stage.start(0)
    stage.operate("again", update("again"))
    while not isinstance(stage.processes[0].orders[0].operation, Adapt):
        stage.do(0)
    stage.operate("vae", update("newer", "vae"))
    stage.start(1)
    stage.do(0, FULL)
    stage.do_all()
    assert stage.replica(0).state == "failed"
    assert stage.serving() == []
    assert "were lost" in stage.replica(1).message
    stage.operate("once more", update("once more"))
    stage.operate("vae once more", update("once more", "vae"))
    stage.do_all()
    assert stage.serving() == [1]


def test_weights_are_not_called_lost_while_one_that_has_them_waits_for_its_adapters() -> None:
    stage = Operating()
    change(stage, "set", INK)
    stage.operate("u", update())
    stage.do_all()
    stage.kill(0)
    stage.kill(1)
    stage.start(0)
    stage.operate("again", update("again"))
    stage.up_to("commit")
    stage.start(1)
    stage.begin()  # which keeps the adapters from both
    assert (stage.serving(), stage.weights()) == ([], {0: "again", 1: "again"})
    assert "were lost" not in stage.replica(1).message
    stage.operate("abort", Abort("u"))
    assert alike(stage)
