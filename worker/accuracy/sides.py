"""Loads a component in the runtime's way and in its library's; each reads the checkpoint itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..model.modules import disable_kv_cache
from ..parallel.ranks import Ranks
from ..weights.checkpoint.pipeline import load_pipeline


@dataclass(frozen=True, slots=True)
class Component:
    """``name`` of the checkpoint in ``directory``, with the weights of ``variant``."""

    directory: Path
    name: str
    cls: type[nn.Module]
    variant: str | None = None

    @property
    def folder(self) -> Path:
        return self.directory / self.name


def runtime(component: Component, dtype: torch.dtype, device: torch.device, ranks: Ranks, *, fused: bool) -> nn.Module:
    """A replica's component, loaded as in :func:`..model.load_model`. Raises ``CannotLoad``."""
    loaded = load_pipeline(component.directory, dtype, device, ranks, fused=fused, only=component.name)
    module: nn.Module = getattr(loaded.pipeline, component.name)
    return _without_cache(module)


def plain(component: Component, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The component as diffusers or transformers load it from its files."""
    cls: Any = component.cls
    module: nn.Module = cls.from_pretrained(
        component.folder, dtype=dtype, use_safetensors=True, variant=component.variant
    )
    return _without_cache(module.to(device).eval())


def exact(
    component: Component, dtype: torch.dtype, device: torch.device, wide: torch.dtype = torch.float64
) -> nn.Module:
    """The plain component with weights rounded to ``dtype``, computing in fp64 or in another ``wide`` precision."""
    # not the model's own `to`, which warns about casting the parts that it keeps in fp32; the cast is intended
    return nn.Module.to(plain(component, dtype, device), wide)


def _without_cache(module: nn.Module) -> nn.Module:
    if isinstance(module, PreTrainedModel):
        disable_kv_cache(module)
    return module
