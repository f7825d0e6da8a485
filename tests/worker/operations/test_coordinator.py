"""The steps of operations on a real model: what a participant wrote is committed or rolled back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from safelight.protocol.adapters import ALL, SetAdapters, UnloadAdapter, UnmergeAdapters
from safelight.protocol.errors import Internal
from safelight.protocol.operations import (
    CACHES,
    Abort,
    Adapt,
    Begin,
    Commit,
    Digests,
    Join,
    Leave,
    Operation,
    OperationStep,
    Perform,
    Settled,
    Sleep,
    Update,
    Wake,
)
from safelight.protocol.reports import Performed, Report
from safelight.protocol.tensor_sources import Files
from safelight.tests.worker.lora.agreement import Made, source, write_adapter
from safelight.worker.forward.batcher import Batcher
from safelight.worker.forward.prompt_cache import PromptCache
from safelight.worker.forward.resources import ForwardResources
from safelight.worker.lora.rank_adapters import RankAdapters
from safelight.worker.model.model import Model
from safelight.worker.model.modules import modules
from safelight.worker.operations.coordinator import Coordinator
from safelight.worker.operations.journal_step import JournalStep
from safelight.worker.operations.participant import OneStep, Prepared
from safelight.worker.operations.resources import PROMPT_CACHE, Resources
from safelight.worker.operations.table import new_coordinator, new_table
from safelight.worker.parallel.ranks import ALONE
from safelight.worker.weights.snapshot.journal import Journal
from safelight.worker.weights.transport.groups import ProcessGroups
from safelight.worker.weights.update.rank_update import RankUpdate
from safelight.worker.weights.update.undo_log import UndoLog

CPU = torch.device("cpu")
NOT_PREPARED = {Begin, Commit, Abort, Settled, Join, Leave}
"""The scheduler's own, and those of groups, which ``GroupOrders`` performs."""


@pytest.fixture(scope="module")
def model(tiny_model: Callable[[str], Model]) -> Model:
    return tiny_model("sd15")


@pytest.fixture
def resources(model: Model, tmp_path: Path) -> Resources:
    return Resources(
        model=model,
        batcher=Batcher(max_batch=1, max_tokens=1),
        ranks=ALONE,
        global_rank=0,
        world_size=1,
        shared=tmp_path,
        journal=Journal(tmp_path),
        undo_log=UndoLog(CPU, 1 << 30, None),
        adapters=RankAdapters(model.pipeline, model.layouts, ALONE, CPU, max_adapters=4, max_bytes=1 << 30),
        groups=ProcessGroups(0, CPU),
        on_progress=lambda: None,
    )


def perform(
    coordinator: Coordinator, step: OperationStep, operation: Operation | None = None, version: str | None = None
) -> Performed:
    order = Perform(number=1, step=step, is_primary=True, operation=operation, weight_version=version)
    return coordinator.perform(order)


def one_tensor(model: Model, folder: Path, module: str = "unet", value: float = 7.0) -> Update:
    """An update of the first tensor of ``module``."""
    name = next(iter(model.layouts[module])).name
    file = folder / f"{module}.safetensors"
    save_file({name: torch.full_like(model.layouts[module].read(name), value)}, file)
    return Update(source=Files(modules={module: [str(file)]}))


class Prompts:
    """A coordinator whose prompt cache knows one prompt."""

    def __init__(self, resources: Resources) -> None:
        self._cache = PromptCache(2**20)
        self._cache.put("prompt", torch.ones(4), exact=True)
        batcher = Batcher(max_batch=1, max_tokens=1, resources=ForwardResources(cache=self._cache))
        self.coordinator = new_coordinator(replace(resources, batcher=batcher))

    @property
    def known(self) -> bool:
        return self._cache.holds("prompt", exact=True)

    def commit(self, operation: Operation) -> list[str]:
        """Returns the caches that the report names."""
        assert perform(self.coordinator, "prepare", operation).error is None
        perform(self.coordinator, "write")
        return perform(self.coordinator, "commit", version="next").report.invalidated


@pytest.mark.parametrize(("module", "dropped"), [("unet", False), ("vae", False), ("text_encoder", True)])
def test_prompts_survive_an_update_of_anything_but_text_encoders(
    module: str, dropped: bool, resources: Resources, tmp_path: Path
) -> None:
    prompts = Prompts(resources)
    assert prompts.commit(one_tensor(resources.model, tmp_path, module, 9.0)) == ([PROMPT_CACHE] if dropped else [])
    assert prompts.known is not dropped


def test_prompts_do_not_survive_an_update_of_a_tensor_that_a_text_encoder_shares(
    resources: Resources, tmp_path: Path
) -> None:
    prompts, pipeline = Prompts(resources), resources.model.pipeline
    pipeline.unet.register_buffer("tied", next(pipeline.text_encoder.parameters()).data, persistent=False)
    pipeline.text_encoder.register_buffer("tied", pipeline.unet.tied, persistent=False)
    try:
        assert prompts.commit(one_tensor(resources.model, tmp_path, "unet", 9.0)) == [PROMPT_CACHE]
    finally:
        del pipeline.unet.tied, pipeline.text_encoder.tied
    assert not prompts.known


def test_prompts_survive_an_update_that_is_rolled_back(resources: Resources, tmp_path: Path) -> None:
    prompts = Prompts(resources)
    perform(prompts.coordinator, "prepare", one_tensor(resources.model, tmp_path, "text_encoder", 9.0))
    perform(prompts.coordinator, "write")
    perform(prompts.coordinator, "rollback", Abort(None))
    assert prompts.known


@pytest.mark.parametrize(("component", "dropped"), [("unet", False), ("text_encoder", True)])
def test_a_change_of_a_text_encoder_s_adapters_drops_prompts_and_one_of_a_denoiser_s_does_not(
    component: str, dropped: bool, resources: Resources, tmp_path: Path
) -> None:
    prompts = Prompts(resources)
    folder = write_adapter(
        Made("words", 2, 2.0, ("to_q", "q_proj"), 1), resources.model.pipeline.components[component], tmp_path
    )
    file = folder / "adapter_model.safetensors"
    tensors = {name.replace("base_model.model.", f"{component}."): one for name, one in load_file(file).items()}
    save_file(tensors, file)
    assert prompts.commit(Adapt(SetAdapters(nicknames=["words"], strengths=[1.0], sources=[source(folder)]))) == (
        [PROMPT_CACHE] if dropped else []
    )
    assert prompts.known is not dropped
    prompts.commit(Adapt(UnmergeAdapters(ALL)))
    prompts.commit(Adapt(UnloadAdapter("words")))


def test_prompts_survive_a_sleep_of_the_weights_and_not_one_of_the_caches(resources: Resources) -> None:
    prompts = Prompts(resources)
    names = [*modules(resources.model.pipeline)]
    for operation in (Sleep(names), Wake(names)):
        assert perform(prompts.coordinator, "prepare", operation).error is None
    assert prompts.known
    report = perform(prompts.coordinator, "prepare", Sleep([CACHES])).report
    assert report.invalidated == [PROMPT_CACHE]
    assert not prompts.known


def digests(coordinator: Coordinator) -> dict[str, str]:
    return perform(coordinator, "prepare", Digests()).report.digests


def test_no_operation_that_the_scheduler_has_prepared_is_without_a_participant(resources: Resources) -> None:
    table = new_table(resources, RankUpdate(resources.model.layouts, resources.undo_log))
    assert set(table) == set(get_args(Operation)) - NOT_PREPARED


def test_an_operation_without_a_participant_fails_and_does_not_end_the_process(resources: Resources) -> None:
    performed = perform(new_coordinator(resources), "prepare", Settled())
    assert performed.error == Internal("There is no such operation.").info()


def test_a_written_update_holds_back_forwards_until_an_abort_has_put_back_every_byte(
    resources: Resources, tmp_path: Path
) -> None:
    coordinator = new_coordinator(resources)
    before = digests(coordinator)
    operation = one_tensor(resources.model, tmp_path)
    assert perform(coordinator, "prepare", operation).error is None
    assert not coordinator.holds
    assert perform(coordinator, "write").report.updated == {"unet": 1}
    assert coordinator.holds
    assert digests(coordinator)["unet"] != before["unet"]
    perform(coordinator, "rollback", Abort(None))
    assert not coordinator.holds
    assert digests(coordinator) == before


def test_what_another_rank_could_not_prepare_is_released_and_the_parts_before_it_are_committed(
    resources: Resources, tmp_path: Path
) -> None:
    coordinator = new_coordinator(resources)
    perform(coordinator, "prepare", one_tensor(resources.model, tmp_path))
    perform(coordinator, "write")
    written = digests(coordinator)
    perform(coordinator, "prepare", one_tensor(resources.model, tmp_path))
    perform(coordinator, "release")
    assert coordinator.holds
    report = perform(coordinator, "commit", version="next").report
    assert (report.updated, report.weight_version, report.invalidated) == ({"unet": 1}, "next", [])
    assert resources.model.weight_version == "next"
    assert digests(coordinator) == written


def test_a_journal_entry_is_dropped_with_the_update_that_it_was_written_for(
    resources: Resources, tmp_path: Path
) -> None:
    coordinator = new_coordinator(resources)
    for end, entries in (("rollback", 0), ("commit", 1)):
        perform(coordinator, "prepare", one_tensor(resources.model, tmp_path))
        perform(coordinator, "write")
        assert perform(coordinator, "journal", version="next").error is None
        perform(coordinator, end, version="next")
        assert len(list(tmp_path.glob("version-*"))) == entries
        assert (tmp_path / "current.json").exists() is bool(entries)


def test_weights_are_the_same_after_they_were_offloaded(resources: Resources) -> None:
    coordinator = new_coordinator(resources)
    before, names = digests(coordinator), [*modules(resources.model.pipeline)]
    assert perform(coordinator, "prepare", Sleep(names)).error is None
    assert digests(coordinator) == before
    assert perform(coordinator, "prepare", Wake(names)).error is None
    assert digests(coordinator) == before


def test_a_wake_of_what_slept_last_leaves_asleep_what_slept_before(resources: Resources) -> None:
    """The scheduler undoes a failed sleep by a wake of the tags that were not asleep before."""
    pipeline, coordinator = resources.model.pipeline, new_coordinator(resources)

    def addresses(module: nn.Module) -> list[int]:
        return [tensor.data_ptr() for tensor in module.parameters()]

    names = [*modules(pipeline)]
    for operation in (Sleep(["unet"]), Sleep(names)):
        assert perform(coordinator, "prepare", operation).error is None
    asleep, others = addresses(pipeline.unet), addresses(pipeline.vae)
    assert perform(coordinator, "prepare", Wake([name for name in names if name != "unet"])).error is None
    assert addresses(pipeline.unet) == asleep
    assert addresses(pipeline.vae) != others
    assert perform(coordinator, "prepare", Wake(["weights"])).error is not None, "the server's word for several tags"
    assert addresses(pipeline.unet) == asleep
    assert perform(coordinator, "prepare", Wake(["unet"])).error is None
    assert addresses(pipeline.unet) != asleep


class Played(OneStep):
    """Notes what it is asked, and answers a commit with its name."""

    def __init__(self, name: str, asked: list[str], *, holds: bool) -> None:
        self.name, self.asked, self.holds = name, asked, holds

    def prepare(self, operation: Operation, *, is_primary: bool) -> Prepared:
        self.asked.append(f"prepare {self.name}")
        return Prepared()

    def commit(self) -> Report:
        self.asked.append(f"commit {self.name}")
        return Report(updated={"unet": 1, self.name: 1}, invalidated=[PROMPT_CACHE, self.name])

    def rollback(self) -> None:
        self.asked.append(f"roll back {self.name}")


def test_participants_commit_in_order_if_they_hold_something_and_roll_back_in_reverse(resources: Resources) -> None:
    asked: list[str] = []
    table = {
        Sleep: Played("one", asked, holds=True),
        Wake: Played("idle", asked, holds=False),
        Digests: Played("two", asked, holds=True),
    }
    journal = JournalStep(resources, RankUpdate(resources.model.layouts, resources.undo_log))
    coordinator = Coordinator(resources.model, ALONE, table, journal)
    report = perform(coordinator, "commit", version="next").report
    assert report.updated == {"unet": 2, "one": 1, "two": 1}
    assert report.invalidated == [PROMPT_CACHE, "one", "two"]
    perform(coordinator, "rollback", Abort(None))
    assert asked == ["commit one", "commit two", "roll back two", "roll back idle", "roll back one"]
