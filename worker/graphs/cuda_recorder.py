"""The recorder of a CUDA device: CUDA graphs, captured on a stream of their own."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch

from .recorder import NotRecordable, Recording

_WARM_UPS = 2
"""Calls before the capture: libraries choose kernels and allocate workspaces in the first ones."""

_OF_A_CAPTURE = "captur"
"""A part of the messages of ``cudaErrorStreamCapture…``: the capture has failed, and the device works on."""


@dataclass(frozen=True, slots=True, eq=False)
class CudaRecording:
    graph: torch.cuda.CUDAGraph
    outputs: Sequence[torch.Tensor]
    nbytes: int

    def replay(self) -> None:
        self.graph.replay()


class CudaRecorder:
    """Records on ``device``, which is the thread's current one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def new_pool(self) -> CudaPool:
        return CudaPool(self._device, self._stream)


class CudaPool:
    def __init__(self, device: torch.device, stream: torch.cuda.Stream) -> None:
        self._device = device
        self._stream = stream
        self._handle = torch.cuda.graph_pool_handle()

    def record(self, function: Callable[[], Sequence[torch.Tensor]]) -> Recording:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UPS):
                function()
            recording = self._capture(function)
        current.wait_stream(self._stream)
        return recording

    def _capture(self, function: Callable[[], Sequence[torch.Tensor]]) -> Recording:
        reserved = torch.cuda.memory_reserved(self._device)
        graph = torch.cuda.CUDAGraph()
        with _without_garbage_collection():
            # other threads copy finished pictures to the host meanwhile, which a capture in global mode forbids
            graph.capture_begin(pool=self._handle, capture_error_mode="thread_local")
            try:
                outputs = list(function())
            except BaseException as error:
                with suppress(RuntimeError):  # the capture is invalid already
                    graph.capture_end()
                raise _translated(error) from error
            try:
                graph.capture_end()
            except RuntimeError as error:
                raise _translated(error) from error
        return CudaRecording(graph, outputs, torch.cuda.memory_reserved(self._device) - reserved)


def _translated(error: BaseException) -> BaseException:
    """``NotRecordable`` for a failure of the capture alone; any other error as it is."""
    if isinstance(error, torch.OutOfMemoryError) or not isinstance(error, RuntimeError):
        return error
    if isinstance(error, torch.AcceleratorError) and _OF_A_CAPTURE not in str(error):
        return error
    return NotRecordable(f"its capture failed: {str(error).partition(chr(10))[0]}")


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Collect nothing meanwhile: an object that frees device memory when it goes would end the capture."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
