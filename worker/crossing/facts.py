"""Facts about modules that pipelines read at every step and only an operation can change: dtypes and devices.

diffusers answers by a walk over all modules, once or twice a step. A batch pays for it once, sixteen requests sixteen
times.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers import DiffusionPipeline
from torch import nn

OF_MODULES = frozenset({"dtype", "device"})
OF_PIPELINES = frozenset({"_execution_device", "device"})

_KINDS = (torch.dtype, torch.device)


class Facts:
    """Reads attributes once and keeps them until :meth:`forget`."""

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[nn.Module | DiffusionPipeline, dict[Hashable, Any]] = WeakKeyDictionary()

    def read(self, holder: nn.Module | DiffusionPipeline, name: str) -> Any:
        """The attribute ``name``; only a dtype or a device is kept."""
        return self._read(holder, name, lambda: getattr(holder, name))

    def found(self, module: nn.Module, find: Callable[[nn.Module], Any]) -> Any:
        """``find(module)``, kept in the same way."""
        return self._read(module, find, lambda: find(module))

    def _read(self, holder: nn.Module | DiffusionPipeline, key: Hashable, read: Callable[[], Any]) -> Any:
        known = self._known.setdefault(holder, {})
        if key in known:
            return known[key]
        value = read()
        if isinstance(value, _KINDS):
            known[key] = value
        return value

    def forget(self) -> None:
        """Read everything anew; required after an operation, which may move or convert weights."""
        self._known.clear()
