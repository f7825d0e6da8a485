"""The peak memory between two moments."""

from __future__ import annotations

import resource
import weakref

import torch


class PeakMemory:
    """Measures peaks on ``device``; several measurements may overlap.

    On a GPU they count torch's allocations. On a CPU there is only the process's resident set, since its start.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._open: weakref.WeakSet[Measurement] = weakref.WeakSet()

    def begin(self) -> Measurement:
        self._collect()
        begun = Measurement()
        self._open.add(begun)
        return begun

    def end_mb(self, begun: Measurement) -> float:
        """The peak since ``begun``, in 10⁶ bytes."""
        if self._device.type != "cuda":
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
        self._collect()
        self._open.discard(begun)
        return begun.peak / 1e6

    def _collect(self) -> None:
        """Give the peak since the last call to every open measurement. The device's own count begins anew."""
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            for one in self._open:
                one.peak = max(one.peak, peak)


class Measurement:
    """A peak in bytes, so far."""

    def __init__(self) -> None:
        self.peak = 0
