"""The recorder of these tests: graphs that are played on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from safelight.tests.played.graphs import PlayedGraph
from safelight.worker.graphs.recorder import NotRecordable


class TapeRecording:
    def __init__(self, graph: PlayedGraph, outputs: list[torch.Tensor]) -> None:
        self.outputs = outputs
        self.nbytes = graph.nbytes
        self.replay = graph.replay


class TapeRecorder:
    """Records on the CPU. ``is_full`` stands for a device without memory."""

    def __init__(self) -> None:
        self.is_full = False
        self.nbytes = 0
        """Bytes of everything that was recorded."""

    def new_pool(self) -> TapeRecorder:
        return self

    def record(self, function: Callable[[], Sequence[torch.Tensor]]) -> TapeRecording:
        if self.is_full:
            raise torch.OutOfMemoryError("CUDA out of memory")
        graph = PlayedGraph()
        graph.capture_begin()
        try:
            outputs = list(function())
        except RuntimeError as error:
            raise NotRecordable(f"its capture failed: {error}") from error
        finally:
            graph.capture_end()
        self.nbytes += graph.nbytes
        return TapeRecording(graph, outputs)
