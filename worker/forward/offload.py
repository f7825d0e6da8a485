"""Weights that rest on the host, as far as forwards and operations need to know of them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch

from ...protocol.replicas import Offloaded
from .runner import Stage


class Offload(Stage, Protocol):
    """A stage that brings a forward's component to the device."""

    def present(self, name: str) -> AbstractContextManager[None]:
        """Within this context the component ``name`` is on the device."""

    @property
    def sizes(self) -> dict[str, Offloaded]:
        """The sizes of each offloaded component."""

    @property
    def shared(self) -> Sequence[torch.Tensor]:
        """The tensors that stay on the device, as several components share them."""

    def rest(self) -> None:
        """Have all weights on the host, where operations read and write them."""
