"""An offloaded component, which says that it is on the device where its forwards compute."""

from __future__ import annotations

import torch
from torch import nn

from ..crossing.overlay import Overlay

OFFLOADED = "offloaded"
"""The one attribute that an offloaded component has and its base has not."""


class OffloadedComponent(Overlay):
    """Stands before a component's class. Pipelines make latents and embeddings on the device that it names."""

    overlay_attribute = OFFLOADED
    offloaded: torch.device

    @property
    def device(self) -> torch.device:
        return self.offloaded


def become_offloaded(component: nn.Module, device: torch.device) -> None:
    component.__class__ = _offloaded(type(component))
    vars(component)[OFFLOADED] = device


def _offloaded(cls: type[nn.Module]) -> type[nn.Module]:
    return type(f"Offloaded{cls.__name__}", (OffloadedComponent, cls), {"__module__": __name__})
