"""The record of played devices: operators, waits of the host, and memory."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

TOTAL_BYTES = 141 * 10**9
"""The memory of a played device: an H200's."""

_LINES = 14


@dataclass(frozen=True, slots=True)
class Wait:
    """An operator at which the host waits for the device: where our code and where a library called it."""

    kind: str
    ours: str
    """The innermost line of ours, such as ``worker/forward/signature.py:103 digest``; empty if there is none."""
    library: str
    """The innermost line outside torch: a library's, or ours again."""

    @property
    def is_ours(self) -> bool:
        """True if our code waits by itself, and not within a library's function."""
        return bool(self.ours) and self.ours == self.library


@dataclass(slots=True)
class Memory:
    """Bytes of one device."""

    live: int = 0
    peak: int = 0
    limit: int = TOTAL_BYTES
    allocations: int = 0


@dataclass(slots=True)
class Record:
    """``events`` are waits and the marks of :meth:`mark`, in order."""

    operators: Counter[str] = field(default_factory=Counter)
    events: list[Wait | str] = field(default_factory=list)
    stacks: dict[Wait, str] = field(default_factory=dict)
    """The frames of each wait when it first occurred."""
    notes_waits: bool = True
    lags: bool = False
    """Copies on streams of their own happen as late as they may."""
    pinned_bytes: int = 0
    """Bytes of page-locked memory that were taken; torch's allocator rounds each piece up to a power of two."""
    captures: bool = False
    """While true, a CUDA graph is being captured, and the host cannot wait."""
    breaks: Path | None = None
    """Once this file exists, the devices no longer work in the process that meets it first, which removes it."""
    is_broken: bool = False
    clock: Callable[[], float] = time.perf_counter
    """The time of events on the device, in seconds. Tests replace it to play a device's speed."""
    _memory: dict[int, Memory] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock)  # finalizers run in the middle of anything

    def memory(self, device: int | torch.device = 0) -> Memory:
        index = device if isinstance(device, int) else device.index or 0
        return self._memory.setdefault(index, Memory())

    @property
    def waits(self) -> Counter[Wait]:
        return Counter(event for event in self.events if isinstance(event, Wait))

    def clear(self) -> None:
        """Forget operators, events and what was pinned; memory stays."""
        self.operators.clear()
        self.pinned_bytes = 0
        self.events.clear()
        self.stacks.clear()

    def mark(self, text: str) -> None:
        self.events.append(text)

    def use(self) -> None:
        """An operator uses a device. Raises ``torch.AcceleratorError`` for ever from when the devices are broken."""
        if self.breaks is not None and self.breaks.exists():
            self.breaks.unlink()
            self.is_broken = True
        if self.is_broken:
            raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    def wait(self, kind: str) -> None:
        """Note that the host waits, with the calling lines. Raises ``RuntimeError`` in a capture."""
        if self.captures:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({kind})")
        self.operators[f"wait: {kind}"] += 1
        if self.notes_waits:
            wait, stack = _calling_lines(kind)
            self.events.append(wait)
            self.stacks.setdefault(wait, stack)

    def allocated(self, size: int, index: int) -> None:
        """Count an allocation. Raises ``torch.OutOfMemoryError`` if it exceeds the device's limit."""
        with self._lock:
            memory = self.memory(index)
            if memory.live + size > memory.limit:
                free = memory.limit - memory.live
                raise torch.OutOfMemoryError(
                    f"CUDA out of memory. Tried to allocate {size} bytes on the played GPU {index}, {free} are free."
                )
            memory.live += size
            memory.allocations += 1
            memory.peak = max(memory.peak, memory.live)

    def freed(self, size: int, index: int) -> None:
        with self._lock:
            self.memory(index).live -= size


def _calling_lines(kind: str) -> tuple[Wait, str]:
    frame = sys._getframe(2)
    ours, library, lines = "", "", []
    while frame is not None:
        name = frame.f_code.co_filename
        if "/tests/played/" not in name and "/torch/" not in name and "<" not in name:
            is_ours = "/site-packages/" not in name and _is_ours(frame.f_globals.get("__name__", ""))
            short = _short(name, frame.f_globals.get("__name__", ""))
            line = f"{short}:{frame.f_lineno} {frame.f_code.co_name}"
            lines.append(line)
            library = library or line
            ours = ours or (line if is_ours else "")
        frame = frame.f_back  # type: ignore[assignment]
    return Wait(kind, ours, library), "\n".join(lines[:_LINES])


def _is_ours(module: str) -> bool:
    return module.startswith("safelight.") and not module.startswith("safelight.tests.")


def _short(path: str, module: str) -> str:
    """The path from the package's or the repository's root."""
    if module.startswith("safelight."):
        depth = module.count(".")
        return "/".join(path.split("/")[-depth:])
    return path.split("/site-packages/")[-1]


RECORD = Record()
"""The record of this process."""
