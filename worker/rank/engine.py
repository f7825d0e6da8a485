"""The engine of one rank: batcher, jobs and operations, and the step that every rank of a replica takes alike."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from ...protocol.child_config import ChildConfig
from ...protocol.config import Config
from ...protocol.generation import Cancel, Generate
from ...protocol.messages import ToWorker
from ...protocol.operations import Perform, SetPaused
from ...protocol.replicas import MergeLimit
from ...protocol.reports import Performed
from ...protocol.self_test import SelfTestResult
from ..caching.caching import Caching
from ..forward.activity import Activity
from ..forward.at_rest import AtRest
from ..forward.batcher import Batcher
from ..forward.prompt_cache import PromptCache
from ..forward.resources import ForwardResources
from ..forward.runner import Division
from ..forward.tiling import Tiling
from ..graphs.setting import new_graphs, stats_of_graphs
from ..lora.rank_adapters import RankAdapters
from ..model.model import Model
from ..model.modules import modules
from ..operations.coordinator import Coordinator
from ..operations.group_orders import GroupOrders
from ..operations.resources import Resources
from ..operations.table import new_coordinator
from ..parallel.lockstep import SettleJoin, Step
from ..parallel.mesh import Mesh
from ..requests.jobs import Jobs
from ..weights.snapshot.journal import Journal
from ..weights.transport.groups import ProcessGroups
from ..weights.update.undo_log import UndoLog
from .compilation import new_compiler, warm_up_compiled
from .event_socket import Outgoing
from .gathering import Gathering, Receive, are_requests
from .graph_warm_up import warm_up_graphs


class Engine:
    """Runs the requests and operations of one rank.

    ``division`` and ``before_forward`` are the batcher's.
    """

    def __init__(
        self,
        child: ChildConfig,
        model: Model,
        self_test: SelfTestResult,
        mesh: Mesh,
        activity: Activity,
        journal: Journal | None,
        division: Division | None,
        *,
        before_forward: Callable[[int], None],
        outgoing: Outgoing,
    ) -> None:
        config, shared = child.config, Path(child.shared)
        adapters = _new_adapters(model, mesh, config)
        groups = ProcessGroups(child.global_rank, model.device, ended=outgoing.wake, receive_s=config.max_update_hold_s)
        self._config, self._model, self._send = config, model, outgoing.report
        self._batcher = _new_batcher(model, self_test, mesh, adapters, activity, config, division, before_forward)
        new_jobs = partial(Jobs, model, self._batcher, outgoing.event, outgoing.wake, is_primary=child.rank == 0)
        stats = stats_of_graphs(self._batcher.resources.graphs, config, model.device)
        self._caching = _new_caching(config, self._batcher, mesh)
        self.jobs = new_jobs(shared=shared, adapters=adapters, caching=self._caching, graphs=stats)
        self._gathering = Gathering(config.gather_s)
        self.group_orders = GroupOrders(groups, mesh.world)
        self._operations: Coordinator = new_coordinator(
            Resources(
                model=model,
                batcher=self._batcher,
                ranks=mesh.world,
                global_rank=child.global_rank,
                world_size=config.world_size,
                shared=shared,
                journal=journal,
                undo_log=_new_undo_log(model, activity, config),
                adapters=adapters,
                groups=groups,
                on_progress=activity.advance,
            )
        )

    @property
    def busy(self) -> bool:
        """True if a step without messages would run something."""
        return self._batcher.busy and not self._operations.holds

    def gather(self, messages: list[ToWorker], receive: Receive) -> list[ToWorker]:
        """``messages`` for the next step, and those that are worth a wait if there is nothing to run."""
        jobs, batcher = self.jobs, self._batcher
        if self.busy or not are_requests(messages):
            self._gathering.arrived(messages, jobs.drawn)
            return messages
        together, batcher.together = batcher.together, 0
        return self._gathering.gather(messages, receive, drawn=jobs.drawn, took_s=jobs.took_s, together=together)

    def run_step(self, step: Step) -> None:
        """Handle the messages of ``step``, then run one step of the batcher unless an operation holds it."""
        self._batcher.policy.limit(step.limits)
        for request_id in step.dropped:
            self.jobs.drop(request_id)
        for message in step.messages:
            match message:
                case Generate():
                    self.jobs.submit(message)
                case Cancel():
                    self.jobs.cancel(message.request_id)
                case SetPaused(paused=paused):
                    self._batcher.paused = paused
                case SettleJoin():
                    self._answer(self.group_orders.settle(message))
                case Perform() if self.group_orders.include(message):
                    self._answer(self.group_orders.perform(message))
                case Perform():
                    self._perform(message)
        if not self._operations.holds:
            self._batcher.step()

    def warm_up(self, report: Callable[[str], None]) -> None:
        """Compile and capture the sizes that the configuration lists. Raises ``StartFailed``."""
        with self._batcher.policy.unmeasured():  # a size's outputs meet, as it names them
            for warm_up in (warm_up_compiled, warm_up_graphs):
                warm_up(self._config, self._model, self._batcher, self._caching, report)

    def changed_limits(self) -> list[MergeLimit]:
        """The limits on merging that this rank's measurements have changed; the next step sets them on all ranks."""
        return self._model.timing.changed_limits()

    def close(self) -> None:
        self.jobs.close()
        if self._batcher.resources.compiled is not None:
            self._batcher.resources.compiled.close()

    def _perform(self, order: Perform) -> None:
        self._model.rest()  # before requests are put aside, so that they do not take the move for their own change
        with self._batcher.aside():
            self._model.rest()  # what they have restored
            performed = self._operations.perform(order)
        self._model.facts.forget()
        self._send(performed)
        self.jobs.set_version(self._model.weight_version)

    def _answer(self, answer: Performed | None) -> None:
        if answer is not None:
            self._send(answer)


def _new_adapters(model: Model, mesh: Mesh, config: Config) -> RankAdapters:
    return RankAdapters(
        model.pipeline,
        model.layouts,
        mesh.world,
        model.device,
        max_adapters=config.max_loras,
        max_bytes=config.max_lora_mb * 1_000_000,
        max_merged_bytes=_host_bytes(config.max_merged_mb, config),
    )


def _new_batcher(
    model: Model,
    self_test: SelfTestResult,
    mesh: Mesh,
    adapters: RankAdapters,
    activity: Activity,
    config: Config,
    division: Division | None,
    before_forward: Callable[[int], None],
) -> Batcher:
    batcher = Batcher(
        max_batch=config.max_batch,
        max_tokens=config.max_positions,
        mode=self_test.mode,
        agree=mesh.agree,
        before_forward=before_forward,
        resources=ForwardResources(
            cache=_new_prompt_cache(config),
            adapters=adapters,
            timing=model.timing,
            at_rest=AtRest(modules(model.pipeline)),
            activity=activity,
            plain_attention=_plain_attention(model),
            tiling=Tiling(modules(model.pipeline), config.vae_tiling, slices=config.vae_slicing),
            compiled=new_compiler(model, config, mesh),
            graphs=new_graphs(config, model.device, modules(model.pipeline), adapters, is_alone=mesh.world.size == 1),
            offload=model.offload,
            division=division,
        ),
    )
    batcher.policy.unmergeable.update(self_test.unmergeable)
    batcher.policy.measured = config.merge_gain > 0
    return batcher


def _new_caching(config: Config, batcher: Batcher, mesh: Mesh) -> Caching:
    def agreed(number: float) -> float:
        return float(mesh.world.all_gather(torch.tensor([number]))[0])

    return Caching(config, batcher.policy.unmergeable, agreed)


def _new_prompt_cache(config: Config) -> PromptCache | None:
    if not config.prompt_cache_mb:
        return None
    return PromptCache(config.prompt_cache_mb * 2**20, compiled=config.compile == "on" and config.compile_text_encoders)


def _plain_attention(model: Model) -> str | None:
    """The attention backend of deterministic requests, if the others have another."""
    chosen = model.attention
    return None if chosen is None or chosen.deterministic == chosen.backend else chosen.deterministic


def _new_undo_log(model: Model, activity: Activity, config: Config) -> UndoLog:
    return UndoLog(
        model.device,
        _host_bytes(config.undo_mb, config),
        _undo_spill(config),
        on_gpu=config.stage_on_gpu,
        on_progress=activity.advance,
    )


def _undo_spill(config: Config) -> Path | None:
    return Path(config.undo_spill) if config.undo_spill is not None else None


def _host_bytes(megabytes: int, config: Config) -> int:
    """``megabytes`` of host memory; for 0, a rank's part of half of the machine's memory."""
    if megabytes:
        return megabytes * 1_000_000
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return memory // 2 // config.world_size
