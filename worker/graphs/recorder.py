"""Recorders: what records a function's kernels over memory that stays where it is, and replays them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch


class NotRecordable(Exception):
    """A block runs eagerly instead. The message says why, about the block: "it draws random numbers"."""


class Recording(Protocol):
    """The kernels of one call. They read the memory that the function read, and write that of ``outputs``."""

    @property
    def outputs(self) -> Sequence[torch.Tensor]:
        """The function's tensors. Each replay overwrites the values, which are undefined before the first one."""

    @property
    def nbytes(self) -> int:
        """Bytes of device memory that the recording added to its pool, with those of the outputs."""

    def replay(self) -> None:
        """Compute the outputs from what the function's inputs hold now."""


class Pool(Protocol):
    """Recordings that share the memory of intermediate values, and no memory of outputs."""

    def record(self, function: Callable[[], Sequence[torch.Tensor]]) -> Recording:
        """Record one call of ``function``, which may be called several times for it.

        Raises ``NotRecordable``, and ``torch.OutOfMemoryError`` when the device is full.
        """


class Recorder(Protocol):
    def new_pool(self) -> Pool:
        """A pool whose memory is free once its recordings are."""
