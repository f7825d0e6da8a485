"""The work of each rank of ``safelight verify``: compare every component of a model in every precision."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from ...formats.model_names import resolve_model
from ...formats.pipeline_index import read_index
from ...protocol.config import Config
from ...protocol.errors import StartFailed
from ..model.model import find_directory, load_model
from ..parallel.ranks import Ranks
from ..weights.checkpoint.components import component_classes
from ..weights.checkpoint.loader import CannotLoad
from . import memory
from .compare import ComparisonSetting, compare
from .policy import Case, Policy, load_policy
from .recorded import CannotKeep, Recorded, read, write
from .recorder import record
from .report import ReportRow, VerificationReport
from .sides import Component
from .task import DType, VerificationTask

_VERSIONS = ("torch", "diffusers", "transformers")


def verify(
    task: VerificationTask, ranks: Ranks, device: torch.device, on_row: Callable[[ReportRow], None]
) -> VerificationReport:
    """Compare all components, and call ``on_row`` for each row. Rows exist on rank 0 only.

    Raises ``StartFailed`` if the model cannot be loaded as requested.
    """
    started = time.monotonic()
    directory = find_directory(str(resolve_model(task.model)))
    components = chosen(component_classes(directory), task.components)
    checkpoint = Checkpoint(directory, load_policy(Path(task.policy)), ranks, device, task.fused, task.staged)
    rows: list[ReportRow] = []
    for dtype in task.dtypes:
        calls = _shared(task, dtype, directory, components, ranks, device)
        for row in checkpoint.rows(components, calls, dtype):
            rows.append(row)
            on_row(row)
    return VerificationReport(
        model=task.model,
        pipeline=checkpoint.pipeline,
        tp=ranks.size,
        fused=task.fused,
        device=str(device),
        versions={name: metadata.version(name) for name in _VERSIONS},
        seconds=time.monotonic() - started,
        rows=rows,
    )


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model's directory and the setting of its comparison. ``staged`` ``None``: if memory requires it."""

    directory: Path
    policy: Policy
    ranks: Ranks
    device: torch.device
    fused: bool
    staged: bool | None = None

    @property
    def pipeline(self) -> str:
        return read_index(self.directory).class_name or ""

    def rows(
        self, components: Mapping[str, type[nn.Module]], calls: Sequence[Recorded], dtype: DType
    ) -> Iterator[ReportRow]:
        """One row per name of a call, on rank 0. All ranks must iterate in lockstep."""
        for name, cls in components.items():
            case = Case(component=name, cls=cls.__name__, pipeline=self.pipeline, dtype=dtype, tp=self.ranks.size)
            own = [call for call in calls if call.owner == name]
            if (exempt := self.policy.skip(case)) is not None:
                yield _without_figures(case, "skipped", f"{exempt.reason}, until {exempt.until}")
            elif not own:
                yield _without_figures(case, "failed", "the pipeline made no call to it")
            else:
                yield from self._compared(Component(self.directory, name, cls), own, case)

    def _compared(self, component: Component, calls: Sequence[Recorded], case: Case) -> list[ReportRow]:
        dtype: torch.dtype = getattr(torch, case.dtype)
        together = memory.fit_together(component.folder, dtype, self.device) if self.staged is None else not self.staged
        setting = ComparisonSetting(dtype, self.device, self.ranks, self.fused, staged=not together)
        try:
            return compare(component, calls, case, self.policy, setting)
        except CannotLoad as error:
            raise StartFailed(f"The model {self.directory} could not be loaded: {error}.") from error


def chosen(classes: dict[str, type[nn.Module]], names: Sequence[str]) -> dict[str, type[nn.Module]]:
    """The components ``names``, or all if it is empty. Raises ``StartFailed``, listing them, for an unknown name."""
    unknown = [name for name in names if name not in classes]
    if unknown:
        raise StartFailed(f"There is no component {unknown[0]!r} with weights; there are {', '.join(classes)}.")
    return {name: cls for name, cls in classes.items() if not names or name in names}


def _shared(
    task: VerificationTask,
    dtype: DType,
    directory: Path,
    components: Mapping[str, object],
    ranks: Ranks,
    device: torch.device,
) -> list[Recorded]:
    """The recorded calls, which rank 0 records for all ranks."""
    folder = Path(task.directory, f"calls-{dtype}")
    if ranks.rank == 0:
        try:
            write([call for call in _recorded(task, dtype, directory, device) if call.owner in components], folder)
        except CannotKeep as error:
            raise StartFailed(f"The calls of {directory} cannot be kept: {error}.") from error
    ranks.all_reduce(torch.zeros(1, device=device))  # the others wait here
    return read(folder)


def _recorded(task: VerificationTask, dtype: DType, directory: Path, device: torch.device) -> list[Recorded]:
    """Record the calls on ``device``, or on the CPU if the whole pipeline does not fit on it."""
    needed = getattr(torch, dtype).itemsize * sum(
        memory.numbers(directory / name) for name in component_classes(directory)
    )
    chosen_device = device if memory.fits(needed, device) else torch.device("cpu")
    calls = record(load_model(Config(model=task.model, dtype=dtype), chosen_device))
    gc.collect()
    return calls


def _without_figures(case: Case, status: Literal["failed", "skipped"], note: str) -> ReportRow:
    return ReportRow(
        call=case.component, component=case.component, cls=case.cls, dtype=case.dtype, status=status, note=note
    )
