"""Which participant performs which operation. A new kind of operation is a participant and its line here."""

from __future__ import annotations

from ...protocol.operations import Adapt, CheckTensors, Digests, Flush, Save, Sleep, TakeSnapshot, Update, Wake
from ..weights.update.rank_update import RankUpdate
from .adapter_change import AdapterPart, AdaptersChange
from .coordinator import Coordinator
from .digest_queries import DigestQuery, TensorCheck
from .journal_step import JournalStep
from .memory import CacheFlush, Offload, OffloadedModules, Restore
from .participant import Table
from .resources import Resources
from .snapshot import Snapshot
from .weight_update import WeightUpdate


def new_coordinator(resources: Resources) -> Coordinator:
    update = RankUpdate(resources.model.layouts, resources.undo_log)
    journal = JournalStep(resources, update)
    return Coordinator(resources.model, resources.ranks, new_table(resources, update), journal)


def new_table(resources: Resources, update: RankUpdate) -> Table:
    offloaded = OffloadedModules(resources)
    return {
        Update: WeightUpdate(resources, update),
        Adapt: AdaptersChange(resources),
        Save: AdapterPart(resources),
        Digests: DigestQuery(resources),
        CheckTensors: TensorCheck(resources),
        Flush: CacheFlush(resources),
        Sleep: Offload(resources, offloaded),
        Wake: Restore(offloaded),
        TakeSnapshot: Snapshot(resources),
    }
