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
        try:
            with _without_garbage_collection(), self._capturing(graph):
                outputs = list(function())
        except RuntimeError as error:
            if _is_of_the_capture(error):
                reason = str(error).partition("\n")[0]
                raise NotRecordable(f"its capture failed: {reason}") from error
            raise
        return CudaRecording(graph, outputs, torch.cuda.memory_reserved(self._device) - reserved)

    @contextmanager
    def _capturing(self, graph: torch.cuda.CUDAGraph) -> Iterator[None]:
        # other threads copy finished pictures to the host meanwhile, which a capture in global mode forbids
        graph.capture_begin(pool=self._handle, capture_error_mode="thread_local")
        try:
            yield
        except BaseException:
            with suppress(RuntimeError):  # it is invalid already
                graph.capture_end()
            raise
        graph.capture_end()


def _is_of_the_capture(error: RuntimeError) -> bool:
    """False for an error that the function raises without a capture, too: no memory, or a broken device."""
    if isinstance(error, torch.AcceleratorError):
        return _OF_A_CAPTURE in str(error)
    return not isinstance(error, torch.OutOfMemoryError)


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
