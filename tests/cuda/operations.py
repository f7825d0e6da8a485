"""Operations on a replica's model, as its only rank performs them."""

from __future__ import annotations

from pathlib import Path

from safelight.protocol.errors import ErrorInfo
from safelight.protocol.operations import Operation, OperationStep, Perform
from safelight.protocol.reports import Performed, Report
from safelight.worker.operations.resources import Resources
from safelight.worker.operations.table import new_coordinator
from safelight.worker.parallel.ranks import ALONE
from safelight.worker.weights.transport.groups import ProcessGroups
from safelight.worker.weights.update.undo_log import UndoLog

from .replica import Replica


class Operations:
    """Takes a replica through the steps of operations; ``shared`` stands for the shared-memory directory."""

    def __init__(self, replica: Replica, shared: Path) -> None:
        device = replica.model.device
        self._coordinator = new_coordinator(
            Resources(
                model=replica.model,
                batcher=replica.batcher,
                ranks=ALONE,
                global_rank=0,
                world_size=1,
                shared=shared,
                journal=None,
                undo_log=UndoLog(device, 1 << 30, None),
                adapters=replica.adapters,
                groups=ProcessGroups(0, device),
                on_progress=lambda: None,
            )
        )

    def perform(self, operation: Operation, *further: OperationStep) -> Report:
        """*prepare* and the ``further`` steps; the last report. Asserts that none is refused."""
        performed = self._perform("prepare", operation)
        for step in further:
            assert performed.error is None, performed.error
            performed = self._perform(step)
        assert performed.error is None, performed.error
        return performed.report

    def refused(self, operation: Operation) -> ErrorInfo:
        """The error of an operation that cannot be prepared."""
        error = self._perform("prepare", operation).error
        assert error is not None
        return error

    def _perform(self, step: OperationStep, operation: Operation | None = None) -> Performed:
        order = Perform(number=1, step=step, is_primary=True, operation=operation, weight_version="next")
        return self._coordinator.perform(order)
