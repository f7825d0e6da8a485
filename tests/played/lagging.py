"""Copies that lag behind the host. Each asserts that its memory on the device still lives when it happens."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch

from .streams import Stream
from .tags import on_host


def copy_later(stream: Stream, target: torch.Tensor, source: torch.Tensor) -> None:
    """Queue the copy. Page-locked memory is kept alive until then, as torch's allocator does; the device's is not."""
    into, out_of = _later(target), _later(source)
    stream.later(lambda: on_host(into()).copy_(on_host(out_of())))


def keep_until_done(tensor: torch.Tensor, stream: Stream) -> None:
    """``Tensor.record_stream``: the memory lives until the stream has done what is queued by now."""
    storage = tensor.untyped_storage()
    stream.later(lambda: storage)


def _later(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    if tensor.device.type == "cpu":
        return lambda: tensor
    storage = weakref.ref(tensor.untyped_storage())
    like = tensor.new_empty(0)
    place = tensor.storage_offset(), tensor.size(), tensor.stride()

    def view() -> torch.Tensor:
        alive = storage()
        assert alive is not None, "memory on the device was freed before a copy on another stream had used it"
        return like.set_(alive, *place)

    return view
