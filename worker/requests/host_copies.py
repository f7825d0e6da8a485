"""Copies of finished outputs to the host, begun at once and waited for by the threads that encode them.

On a GPU the copies have a stream of their own: on the current one they would come behind the next forward.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..parallel.device import pinned


class HostCopies:
    """Begins copies from ``device``; tensors of the host stay as they are."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def begin(self, tensor: torch.Tensor) -> torch.Tensor:
        """A contiguous tensor in host memory, which has the values once :meth:`end`'s function has returned.

        The caller may drop ``tensor`` at once.
        """
        tensor = tensor.detach()
        if self._stream is None or tensor.device.type != "cuda":
            return tensor
        self._stream.wait_stream(torch.cuda.current_stream(self._device))  # whose kernels compute the values
        buffer = _buffer(tensor)
        with torch.cuda.stream(self._stream):
            buffer.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._stream)  # its memory is used again only after the copy
        return buffer

    def end(self) -> Callable[[], object]:
        """A function that waits for the copies that were begun so far, in any thread."""
        return (lambda: None) if self._stream is None else self._stream.record_event().synchronize


def _buffer(like: torch.Tensor) -> torch.Tensor:
    try:
        return pinned(like.nbytes).view(like.dtype).view(like.shape)
    except OSError:  # then the copy is slower, and this thread waits for it
        return torch.empty(like.shape, dtype=like.dtype)
