"""Comparisons and numbers of a GPU's tensors that the host reads later, so that no step waits for the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..parallel.device import pinned


class LateNumbers:
    """The values of 0-dim tensors, on their way to the host."""

    def __init__(self, values: Sequence[torch.Tensor]) -> None:
        stacked = torch.stack(list(values))
        self._arrived: torch.cuda.Event | None = None
        if stacked.device.type == "cuda":
            self._host = pinned(stacked.nbytes).view(stacked.dtype)
            self._host.copy_(stacked, non_blocking=True)
            self._arrived = torch.cuda.current_stream(stacked.device).record_event()
        else:
            self._host = stacked

    @property
    def is_late(self) -> bool:
        return self._arrived is not None

    def read(self) -> list[float]:
        """The values; waits for them only if they have not arrived."""
        if self._arrived is not None and not self._arrived.query():  # type: ignore[no-untyped-call]
            self._arrived.synchronize()
        return [float(value) for value in self._host.tolist()]


class LateEqualities:
    """Compares nested tensors and plain values, as :func:`....rollout.equality.equal` does, and reads all results once.

    Tensors of the host are compared at once.
    """

    def __init__(self) -> None:
        self._differ = False
        self._equal: list[torch.Tensor] = []
        self._versions: dict[int, int] = {}

    def remember(self, tree: Any) -> None:
        """Note the versions of the tensors in ``tree``, which the caller keeps: equal ones need no comparison then."""
        tensors = (leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor))
        self._versions |= {id(leaf): leaf._version for leaf in tensors if not leaf.is_inference()}

    def expect(self, holds: bool) -> None:
        self._differ |= not holds

    def compare(self, one: Any, other: Any) -> None:
        if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
            self._compare_tensors(one, other)
        elif isinstance(one, Mapping) and isinstance(other, Mapping):
            self.expect(one.keys() == other.keys())
            for name in one.keys() & other.keys():
                self.compare(one[name], other[name])
        elif isinstance(one, list | tuple) and isinstance(other, list | tuple):
            self.expect(len(one) == len(other))
            for value, its in zip(one, other, strict=False):
                self.compare(value, its)
        else:
            self.expect(type(one) is type(other) and bool(one == other))

    def _compare_tensors(self, one: torch.Tensor, other: torch.Tensor) -> None:
        if one is other and not one.is_inference():
            self.expect(self._versions.get(id(one), one._version) == one._version)  # nobody has written to it
        elif one.shape != other.shape:
            self.expect(holds=False)
        elif one.device.type == "cuda":
            self._equal.append((one == other).all())
        else:
            self.expect(torch.equal(one, other))

    def hold(self) -> bool:
        """True if everything was equal. Waits for the device, if there is anything to read from it."""
        if self._equal and not self._differ:
            self.expect(bool(torch.stack(self._equal).all()))
        self._equal.clear()
        return not self._differ
