"""Comparisons of values on a GPU that are read one step late, so that they make the host wait for nothing.

The result of a comparison is copied to the host behind the forward that is queued already. When it is read, a step
later, the GPU has the next forward in its queue.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


class PredictionWrong(Exception):
    """A call that was answered as predicted had another value: the sample must be computed again without predictions.

    No pipeline of diffusers is known to do this.
    """


class LateCheck:
    """Compares values that were assumed to be equal. At most one comparison is on its way."""

    def __init__(self) -> None:
        self._copied: torch.Tensor | None = None
        self._ready: torch.cuda.Event | None = None

    def expect_equal(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Compare ``pairs``, each of one shape, dtype and device, and read the last comparison."""
        self.settle()
        equal = torch.stack([(one == other).all() for one, other in pairs]).all()
        if equal.device.type != "cuda":
            self._copied = equal
            return
        self._copied = torch.empty((), dtype=torch.bool, pin_memory=True)
        self._copied.copy_(equal, non_blocking=True)
        self._ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._ready.record()

    def settle(self) -> None:
        """Read the last comparison. Raises ``PredictionWrong``."""
        copied, self._copied = self._copied, None
        ready, self._ready = self._ready, None
        if ready is not None and not ready.query():  # type: ignore[no-untyped-call]
            ready.synchronize()
        if copied is not None and not copied:
            raise PredictionWrong
