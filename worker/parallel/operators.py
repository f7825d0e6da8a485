"""Collectives as operators of torch, so that compiled code calls them and does not trace into them.

An operator takes tensors and constants: it finds this process's ranks by the name of their axis, as torch's own
collectives find groups.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol
from weakref import WeakValueDictionary

import torch


class Collectives(Protocol):
    """The collectives of the ranks along one axis."""

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor: ...

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]: ...

    def exchange(self, tensor: torch.Tensor) -> torch.Tensor: ...


_BY_AXIS: WeakValueDictionary[str, Collectives] = WeakValueDictionary()
_THREAD = threading.local()


def register(axis: str, collectives: Collectives) -> None:
    _BY_AXIS[axis] = collectives


@contextmanager
def played() -> Iterator[None]:
    """Within this context, collectives of this thread compute what they would if all ranks had this rank's tensors."""
    assert not is_played()
    _THREAD.played = True
    try:
        yield
    finally:
        del _THREAD.played


def is_played() -> bool:
    return "played" in vars(_THREAD)


@torch.library.custom_op("safelight::all_reduce", mutates_args={"tensor"})
def all_reduce(tensor: torch.Tensor, axis: str) -> None:
    _BY_AXIS[axis].all_reduce(tensor)


@torch.library.custom_op("safelight::all_gather", mutates_args=())
def all_gather(tensor: torch.Tensor, axis: str, size: int) -> torch.Tensor:
    """``tensor`` of each of the ``size`` ranks, along a new first dimension."""
    return torch.stack(_BY_AXIS[axis].all_gather(tensor))


@all_gather.register_fake
def _(tensor: torch.Tensor, axis: str, size: int) -> torch.Tensor:
    return tensor.new_empty(size, *tensor.shape)


@torch.library.custom_op("safelight::exchange", mutates_args=())
def exchange(tensor: torch.Tensor, axis: str) -> torch.Tensor:
    return _BY_AXIS[axis].exchange(tensor)


@exchange.register_fake
def _(tensor: torch.Tensor, axis: str) -> torch.Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)
