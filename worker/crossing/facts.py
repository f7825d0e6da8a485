"""Facts about modules that pipelines read at every step and only an operation can change: dtypes and devices.

diffusers answers by a walk over all modules, once or twice a step. A batch pays for it once, sixteen requests sixteen
times.
"""

from __future__ import annotations

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
        self._known: WeakKeyDictionary[nn.Module | DiffusionPipeline, dict[str, Any]] = WeakKeyDictionary()

    def read(self, holder: nn.Module | DiffusionPipeline, name: str) -> Any:
        """The attribute ``name``; only a dtype or a device is kept."""
        known = self._known.setdefault(holder, {})
        if name in known:
            return known[name]
        value = getattr(holder, name)
        if isinstance(value, _KINDS):
            known[name] = value
        return value

    def forget(self) -> None:
        """Read everything anew; required after an operation, which may move or convert weights."""
        self._known.clear()
