"""Adapters within begun updates: with the weights beside them, on every replica or on none."""

import pytest

from safelight.protocol.adapters import AdapterSource
from safelight.protocol.config import Config
from safelight.protocol.errors import Internal
from safelight.protocol.operations import Abort, Adapt, Commit, Leave, Save
from safelight.protocol.reports import Report
from safelight.protocol.tensor_sources import Broadcast, Files

from .adapting import set_adapters, words
from .operating import Operating, update

FULL = Internal("There is no room.")


def part(word: str, module: str = "transformer", **options: object) -> Save:
    """A part after which the adapter of ``module`` is ``word``."""
    adapter = AdapterSource(f"lora_merge:{module}", None, f"/shared/{word}", word, target=module)
    return Save(source=Files({module: [word]}), adapter=adapter, update_id="u", **options)  # type: ignore[arg-type]


def begun(*, journal: bool = False) -> Operating:
    stage = Operating(config=Config(replicas=2, weights_journal="/journal") if journal else None)
    stage.begin()
    for name in ("first", "second"):
        stage.operate(name, part(name))
        stage.do_all()
        stage.done(name)
    return stage


def test_an_adapter_is_merged_with_the_commit_and_not_before() -> None:
    stage = begun()
    assert stage.adapters() == {0: {}, 1: {}}
    stage.commit()
    stage.do_all()
    reported = stage.done("commit u")
    assert stage.adapters() == {0: {"lora_merge:transformer": "second"}, 1: {"lora_merge:transformer": "second"}}
    assert words(reported.adapters) == {"lora_merge:transformer": "second"}
    assert (reported.weight_version, {process.version for process in stage.processes.values()}) == ("1", {"1"})
    assert stage.steps(0)[-3:] == ["prepare", "write", "commit"]


@pytest.mark.parametrize("journal", [False, True])
def test_weights_and_an_adapter_are_committed_together(journal: bool) -> None:
    stage = begun(journal=journal)
    stage.operate("weights", update(part_of="u"))
    stage.do_all()
    stage.operate("commit u", Commit("u"))
    stage.up_to("commit")
    assert stage.steps(0)[-2:] == (["journal", "commit"] if journal else ["write", "commit"])
    stage.do_all()
    assert stage.done("commit u").weight_version == "1"
    assert stage.weights() == {0: "new", 1: "new"}
    assert stage.adapters()[0] == stage.adapters()[1] == {"lora_merge:transformer": "second"}
    stage.kill(1)
    stage.start(1)
    stage.do_all()
    assert (stage.weights()[1], stage.adapters()[1]) == ("new", {"lora_merge:transformer": "second"})
    assert stage.serving() == [0, 1]


@pytest.mark.parametrize("who", [0, 1])
def test_weights_are_put_back_where_the_adapter_of_the_same_update_cannot_be_written(who: int) -> None:
    stage = begun()
    stage.operate("weights", update(part_of="u"))
    stage.do_all()
    stage.operate("commit u", Commit("u"))
    stage.up_to("write")
    stage.do(who, FULL)
    stage.do_all()
    assert stage.refusal("commit u") == FULL.message
    assert stage.weights() == {0: "checkpoint", 1: "checkpoint"}
    assert stage.adapters() == {0: {}, 1: {}}
    assert not any(process.open for process in stage.processes.values())


def test_an_update_stays_open_where_its_adapter_is_refused() -> None:
    """More can be sent, or all aborted."""
    stage = begun()
    stage.operate("weights", update(part_of="u"))
    stage.do_all()
    stage.operate("commit u", Commit("u"))
    stage.up_to("prepare")
    stage.do(0, FULL)
    stage.do_all()
    assert stage.refusal("commit u") == FULL.message
    stage.operate("abort", Abort("u"))
    stage.do_all()
    assert stage.weights() == {0: "checkpoint", 1: "checkpoint"}
    assert stage.adapters() == {0: {}, 1: {}}


def test_no_update_is_committed_while_half_a_pair_waits() -> None:
    stage = begun()
    stage.operate("half", part("half"))
    stage.do(0, report=Report(waiting=["x.lora_A"]))
    stage.do_all()
    stage.commit()
    assert "1 factors have no counterpart (x.lora_A)" in stage.refusal("commit u")
    stage.operate("other half", part("whole"))
    stage.do_all()
    stage.operate("again", Commit("u"))
    stage.do_all()
    assert stage.adapters()[1] == {"lora_merge:transformer": "whole"}


def test_a_part_for_a_module_that_the_update_was_not_begun_for_is_refused() -> None:
    stage = Operating()
    stage.begin(modules=["vae"])
    stage.operate("part", part("word"))
    assert "not begun for transformer" in stage.refusal("part")


def test_another_adapter_stays_active_while_one_is_sent() -> None:
    stage = Operating()
    stage.operate("set", Adapt(set_adapters("ink", words=["black"])))
    stage.do_all()
    stage.begin()
    stage.operate("part", part("sent"))
    stage.do_all()
    stage.commit()
    stage.do_all()
    assert stage.adapters()[0] == {"ink": "black", "lora_merge:transformer": "sent"}


def test_a_group_is_left_where_its_part_is_refused() -> None:
    stage = Operating()
    source = Broadcast("group", "transformer", ["x"], ["float32"], [[1]])
    adapter = AdapterSource("lora_merge:transformer", None, "/shared/x", "x", target="transformer")
    stage.operate("part", Save(source=source, adapter=adapter, update_id="ended"))
    assert "no begun update" in stage.refusal("part")
    assert isinstance(stage.processes[0].orders[0].operation, Leave)
