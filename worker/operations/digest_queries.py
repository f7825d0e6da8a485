"""Queries about the digests of the weights."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from ...protocol.errors import Internal, InvalidRequest, NotFound
from ...protocol.operations import CheckTensors, Digests
from ...protocol.reports import Report
from ..weights.checkpoint.layout import Layout
from ..weights.snapshot.digests import module_digests, tensor_digests
from ..weights.transport.sources import Rejected
from .participant import OneStep, Prepared
from .resources import Resources


class DigestQuery(OneStep):
    """Tells the digests of modules, and fails where the ranks differ."""

    def __init__(self, resources: Resources) -> None:
        self._resources = resources

    def prepare(self, operation: Digests, *, is_primary: bool) -> Prepared:
        known, ranks = self._resources.model.layouts, self._resources.ranks
        names = list(known) if operation.modules is None else [name for name in operation.modules if name in known]
        layouts = {name: known[name] for name in names}
        by_rank, tensors = module_digests(layouts, ranks, self._resources.on_progress, detail=operation.detail)
        self._check_ranks(by_rank)
        version = self._resources.model.weight_version
        report = Report(digests=by_rank[0], tensors=tensors, weight_version=version)
        return Prepared(_with_names(report, layouts) if operation.detail else report)

    def _check_ranks(self, by_rank: list[dict[str, str]]) -> None:
        first, *others = by_rank
        replica = self._resources.replica
        for rank, other in enumerate(others, start=1):
            for module, digest in first.items():
                if other[module] != digest:
                    raise Internal(f"Rank {rank} of replica {replica} has other weights in {module} than rank 0.")


def _with_names(report: Report, layouts: Mapping[str, Layout]) -> Report:
    return msgspec.structs.replace(
        report,
        aliases={name: dict(layout.names.aliases) for name, layout in layouts.items()},
        ignored={name: list(layout.names.ignored) for name, layout in layouts.items()},
    )


class TensorCheck(OneStep):
    """Compares tensors of one module with the digests that the caller expects."""

    def __init__(self, resources: Resources) -> None:
        self._resources = resources

    def prepare(self, operation: CheckTensors, *, is_primary: bool) -> Prepared:
        layout = self._layout(operation.module)
        left_out = [name for name in operation.expected if name not in layout and layout.names.leaves_out(name)]
        checkpoint_names = {
            name: layout.names.aliases.get(name, name) for name in operation.expected if name not in left_out
        }
        missing = sorted(name for name, known in checkpoint_names.items() if known not in layout)
        present = sorted({known for known in checkpoint_names.values() if known in layout})
        found = tensor_digests(layout, present, self._resources.on_progress)
        mismatched = sorted(
            name
            for name, known in checkpoint_names.items()
            if known in found and found[known].sha256 != operation.expected[name].lower()
        )
        version = self._resources.model.weight_version
        report = Report(missing=missing, mismatched=mismatched, left_out=left_out, weight_version=version)
        if not checkpoint_names:
            raise InvalidRequest(f"A checkpoint has none of these tensors ({', '.join(left_out[:3])}).")
        if missing or mismatched:
            message = f"{len(missing)} tensors are missing, and {len(mismatched)} are not as expected."
            raise Rejected(InvalidRequest(message), report)
        return Prepared(report)

    def _layout(self, module: str) -> Layout:
        layouts = self._resources.model.layouts
        if module not in layouts:
            known = ", ".join(layouts)
            raise NotFound(f"The model has no module {module!r}; it has {known}.", field="target_module")
        return layouts[module]
