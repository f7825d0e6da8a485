"""A component as the runtime loads it, and as its own library does. Each reads the checkpoint for itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..model import forget_cache
from ..parallel.ranks import Ranks
from ..weights.pipeline import load_known_components


@dataclass(frozen=True, slots=True)
class Component:
    """``name`` of the checkpoint in ``directory``."""

    directory: Path
    name: str
    cls: type[nn.Module]

    @property
    def folder(self) -> Path:
        return self.directory / self.name


def runtime(component: Component, dtype: torch.dtype, device: torch.device, ranks: Ranks, *, fused: bool) -> nn.Module:
    """What a replica has, by the way that :func:`..model.load_model` takes. Raises ``CannotLoad``."""
    if fused or ranks.size > 1:
        own = load_known_components(component.directory, dtype, device, ranks, fused=fused, only=(component.name,)).get(
            component.name
        )
        if own is not None:
            return _without_cache(own.module)
    return plain(component, dtype, device)


def plain(component: Component, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """What diffusers or transformers make of the checkpoint."""
    cls: Any = component.cls
    module: nn.Module = cls.from_pretrained(component.folder, dtype=dtype, use_safetensors=True)
    return _without_cache(module.to(device).eval())


def exact(component: Component, dtype: torch.dtype, device: torch.device, computed_in: torch.dtype) -> nn.Module:
    """The plain component with weights rounded to ``dtype``, which computes in ``computed_in``."""
    # not the model's own `to`, which warns that what it keeps in fp32 is cast: here that is meant
    return nn.Module.to(plain(component, dtype, device), computed_in)


def _without_cache(module: nn.Module) -> nn.Module:
    if isinstance(module, PreTrainedModel):
        forget_cache(module)
    return module
