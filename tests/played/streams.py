"""Streams, events and the current device of ``torch.cuda`` on played devices.

Everything happens in order. While :attr:`Record.lags` is set, copies from and to page-locked memory that are begun on
other streams than the default one happen as late as events and waits allow: that shows buffers that are used again too
early, and waits that are missing.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .record import RECORD


class _Thread(threading.local):
    device = 0


_thread = _Thread()
_doing = threading.RLock()
"""Held by the thread that does what is queued, in any stream: streams wait for one another."""


def current_device() -> int:
    return _thread.device


def set_device(device: int | str | torch.device) -> None:
    _thread.device = index_of(device)


def index_of(device: int | str | torch.device | None = None) -> int:
    if isinstance(device, int):
        return device
    index = None if device is None else torch.device(device).index
    return current_device() if index is None else index


class Device(contextlib.AbstractContextManager[None]):
    """``torch.cuda.device``."""

    def __init__(self, device: int | str | torch.device | None) -> None:
        self._index = index_of(device)

    def __enter__(self) -> None:
        self._before = current_device()
        set_device(self._index)

    def __exit__(self, *_: object) -> None:
        set_device(self._before)


class Event:
    """A moment on the device; recorded events are past, as the device never lags behind."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self._timed = enable_timing
        self._moment: float | None = None
        self._behind: tuple[Stream, int] | None = None

    def record(self, stream: Stream | None = None) -> None:
        self._moment = RECORD.clock()
        stream = stream or current_stream()
        self._behind = stream, stream.queued

    def wait(self, stream: Stream | None = None) -> None:
        (stream or current_stream()).wait_event(self)

    def query(self) -> bool:
        return self._behind is None or self._behind[0].done >= self._behind[1]

    def happen(self) -> None:
        """Do all that is queued before the event."""
        if self._behind is not None:
            self._behind[0].catch_up(self._behind[1])

    def synchronize(self) -> None:
        RECORD.wait("event.synchronize")
        self.happen()

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds. Raises ``ValueError`` for events that were not recorded with timing, as torch does."""
        if not (self._timed and end._timed) or self._moment is None or end._moment is None:
            raise ValueError(
                "Both events must be recorded, with timing enabled, before their elapsed time is asked for"
            )
        return (end._moment - self._moment) * 1000


class Stream:
    def __init__(self, device: int | str | torch.device | None = None, priority: int = 0, **_: Any) -> None:
        self.device = torch.device("cuda", index_of(device))
        self.cuda_stream = id(self)
        self.queued = self.done = 0
        self._queue: deque[Callable[[], object]] = deque()
        _streams.add(self)

    @property
    def lags(self) -> bool:
        return RECORD.lags and self not in _defaults.values()

    def later(self, work: Callable[[], object]) -> None:
        self._queue.append(work)
        self.queued += 1

    def catch_up(self, position: int | None = None) -> None:
        """Do what is queued, up to ``position``. What another thread is doing has ended then."""
        with _doing:
            while self._queue and (position is None or self.done < position):
                self._queue.popleft()()
                self.done += 1

    def synchronize(self) -> None:
        RECORD.wait("stream.synchronize")
        self.catch_up()

    def wait_stream(self, stream: Stream) -> None:
        self.wait_event(stream.record_event())

    def wait_event(self, event: Event) -> None:
        if self.lags:
            self.later(event.happen)
        else:
            event.happen()

    def record_event(self, event: Event | None = None) -> Event:
        made = event or Event()
        made.record(self)
        return made

    def query(self) -> bool:
        return not self._queue


def synchronize(device: int | str | torch.device | None = None) -> None:
    RECORD.wait("torch.cuda.synchronize")
    for stream in list(_streams):
        stream.catch_up()


_streams: weakref.WeakSet[Stream] = weakref.WeakSet()
_defaults: dict[int, Stream] = {}
_current: dict[tuple[int, int], Stream] = {}
"""Streams of ``torch.cuda.stream``, by thread and device."""


def default_stream(device: int | str | torch.device | None = None) -> Stream:
    index = index_of(device)
    return _defaults.setdefault(index, Stream(index))


def current_stream(device: int | str | torch.device | None = None) -> Stream:
    index = index_of(device)
    return _current.get((threading.get_ident(), index)) or default_stream(index)


def set_stream(stream: Stream) -> None:
    """Make ``stream`` its device's current one, and its device the current one."""
    _current[threading.get_ident(), stream.device.index] = stream
    set_device(stream.device)


@contextlib.contextmanager
def use_stream(stream: Stream | None) -> Iterator[None]:
    """``torch.cuda.stream``."""
    if stream is None:
        yield
        return
    device, before = current_device(), current_stream(stream.device)
    set_stream(stream)
    try:
        yield
    finally:
        set_stream(before)
        set_device(device)
