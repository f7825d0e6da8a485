"""Checks that an update's tensors can be written, before anything is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import torch

from ....protocol.errors import InvalidRequest, NotFound
from ....protocol.reports import Invalid, Report
from ..checkpoint.aliases import Named
from ..checkpoint.layout import Layout
from ..checkpoint.names import Tensors, memory_of
from ..transport.sources import Rejected

MAX_LISTED = 20
"""Tensors that a report lists by name."""


def check_tensors(tensors: Tensors, layouts: Mapping[str, Layout]) -> Report:
    """Check names, shapes and dtypes; values are not read. Raises ``Rejected``."""
    absent = [module for module in tensors if module not in layouts]
    if absent:
        message = f"The model has no module {absent[0]!r}; it has {', '.join(layouts)}."
        raise Rejected(NotFound(message, field="target_modules"), Report())
    expected = {module: len(layouts[module]) for module in tensors}
    unknown = [
        name_for_sender(tensors, module, name)
        for module, given in tensors.items()
        for name in given
        if name not in layouts[module]
    ]
    invalid = [
        Invalid(name_for_sender(tensors, module, name), reason)
        for module, given in tensors.items()
        for name, tensor in given.items()
        if name in layouts[module] and (reason := _fault(layouts[module], name, tensor))
    ]
    if unknown or invalid:
        report = Report(expected=expected, unknown=unknown[:MAX_LISTED], invalid=invalid[:MAX_LISTED])
        raise Rejected(InvalidRequest(_sentence(unknown, invalid)), report)
    return Report(updated={module: len(given) for module, given in tensors.items()}, expected=expected)


def check_ties(named: Named, layouts: Mapping[str, Layout]) -> None:
    """Raise ``Rejected`` where tied names come with different values: only one of them could be written."""
    seen: dict[tuple[Any, ...], tuple[str, torch.Tensor]] = {}
    for module, given in named.tensors.items():
        for name, tensor in given.items():
            local = layouts[module].local(name)
            if not local.numel():
                continue
            other, before = seen.setdefault(memory_of(local), (f"{module}.{name}", tensor))
            _compare_tied(name, tensor, other, before, local.dtype)
    for tied in named.tied:
        before, dtype = named.tensors[tied.module][tied.known], layouts[tied.module].dtype(tied.known)
        _compare_tied(tied.name, tied.tensor, f"{tied.module}.{tied.known}", before, dtype)


def check_complete(named: Named, layouts: Mapping[str, Layout], *, complete: bool) -> None:
    """Raise ``Rejected`` where nothing is left to write, or where ``complete`` is asked for and tensors are missing."""
    if named.left_out and not any(named.tensors.values()):
        message = f"Nothing was written: a checkpoint has none of the names ({', '.join(named.left_out[:3])})."
        raise Rejected(InvalidRequest(message), Report(unknown=named.left_out[:MAX_LISTED]))
    missing = [
        name_for_sender(named.tensors, module, name)
        for module, given in named.tensors.items()
        for name in (missing_names(layouts[module], given) if complete else ())
    ]
    if missing:
        message = (
            f"Nothing was written: {len(missing)} tensors are missing ({', '.join(missing[:3])}). To write what "
            "there is, give require_complete = false."
        )
        raise Rejected(InvalidRequest(message, field="require_complete"), Report(missing=missing[:MAX_LISTED]))


def missing_names(layout: Layout, names: Iterable[str]) -> list[str]:
    """The tensors of a module that are neither in ``names`` nor tied to one that is."""
    given = {name: layout.local(name) for name in names}
    written = {memory_of(tensor) for tensor in given.values() if tensor.numel()}
    others = [entry.name for entry in layout if entry.name not in given]
    return [name for name in others if memory_of(layout.local(name)) not in written]


def name_for_sender(tensors: Tensors, module: str, name: str) -> str:
    """The name as its sender knows it, with the module's name where there are several modules."""
    return name if len(tensors) == 1 else f"{module}.{name}"


def _compare_tied(name: str, tensor: torch.Tensor, other: str, before: torch.Tensor, dtype: torch.dtype) -> None:
    if before is not tensor and not _same_bits(before.to(dtype), tensor.to(dtype)):
        fault = Invalid(name, f"it is tied to {other}, and its values are not the same")
        raise Rejected(InvalidRequest(_sentence([], [fault])), Report(invalid=[fault]))


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(
        *(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    )


def _fault(layout: Layout, name: str, tensor: torch.Tensor) -> str | None:
    """Why ``tensor`` cannot be written, in a few words."""
    wanted = layout.dtype(name)
    if tuple(tensor.shape) != layout[name].shape:
        return f"its shape is {list(tensor.shape)}, not {list(layout[name].shape)}"
    if tensor.dtype != wanted and not (tensor.is_floating_point() and wanted.is_floating_point):
        return f"its dtype is {tensor.dtype}, not {wanted}"
    return None


def _sentence(unknown: list[str], invalid: list[Invalid]) -> str:
    parts = []
    if unknown:
        parts.append(f"{len(unknown)} names that the model does not have ({', '.join(islice(unknown, 3))})")
    if invalid:
        first = invalid[0]
        parts.append(f"{len(invalid)} tensors that do not fit ({first.name}: {first.reason})")
    return f"Nothing was written: there are {' and '.join(parts)}."
