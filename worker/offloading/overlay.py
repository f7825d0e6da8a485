"""An offloaded component, which says that it is on the device where its forwards compute."""

from __future__ import annotations

import torch
from torch import nn

from ..crossing.overlay import Overlay, put_overlay


class OffloadedComponent(Overlay):
    """Stands before a component's class. Pipelines make latents and embeddings on the device that it names."""

    overlay_attribute = "offloaded"
    offloaded: torch.device

    @property
    def device(self) -> torch.device:
        return self.offloaded


def become_offloaded(component: nn.Module, device: torch.device) -> None:
    put_overlay(OffloadedComponent, component, device)
