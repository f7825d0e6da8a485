"""A component as the runtime loads it, and as its own library does. Each reads the checkpoint for itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..modules import disable_kv_cache
from ..parallel.ranks import Ranks
from ..weights.checkpoint.pipeline import load_pipeline


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
    """What a replica has, loaded as :func:`..model.load_model` does. Raises ``CannotLoad``."""
    loaded = load_pipeline(component.directory, dtype, device, ranks, fused=fused, only=component.name)
    module: nn.Module = getattr(loaded.pipeline, component.name)
    return _without_cache(module)


def plain(component: Component, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """What diffusers or transformers make of the component's own files."""
    cls: Any = component.cls
    module: nn.Module = cls.from_pretrained(component.folder, dtype=dtype, use_safetensors=True)
    return _without_cache(module.to(device).eval())


def exact(component: Component, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The plain component with weights rounded to ``dtype``, which computes in fp64."""
    # not the model's own `to`, which warns that what it keeps in fp32 is cast: here that is meant
    return nn.Module.to(plain(component, dtype, device), torch.float64)


def _without_cache(module: nn.Module) -> nn.Module:
    if isinstance(module, PreTrainedModel):
        disable_kv_cache(module)
    return module
