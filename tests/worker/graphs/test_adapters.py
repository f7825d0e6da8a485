"""A change of adapters changes what graphs read, or is another shape: never what a forward of others computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from msgspec.structs import replace

from safelight.protocol.adapters import Use
from safelight.tests.worker.graphs.recording import TapeRecorder
from safelight.tests.worker.lora.agreement import change, draw, new_adapters, request
from safelight.tests.worker.lora.test_mixing import LINEAR, prepared
from safelight.worker.forward.batcher import Batcher
from safelight.worker.forward.resources import ForwardResources
from safelight.worker.graphs.graphs import Graphs
from safelight.worker.model.model import Model


def test_other_adapters_and_strengths_are_read_by_the_graphs_that_there_are(
    tiny_model: Callable[[str], Model], tmp_path: Path
) -> None:
    model = tiny_model("flux")
    adapters = new_adapters(model)
    change(adapters, prepared(model, LINEAR, tmp_path))
    parts = {"transformer": model.pipeline.transformer}
    graphs = Graphs(parts, TapeRecorder(), adapters, max_bytes=10**10, record_after=1)

    def batcher(*, graphed: bool, rows: int = 1) -> Batcher:
        found = graphs if graphed else None
        return Batcher(max_batch=rows, max_tokens=10**6, resources=ForwardResources(adapters=adapters, graphs=found))

    first, strong, second = [Use("first")], [Use("first", 0.5)], [Use("second")]
    captures = []
    for number, uses in enumerate([None, first, strong, second, first, None]):
        asked = request("flux", number, uses)
        (picture,) = draw(model, batcher(graphed=True), adapters, [asked])
        captures.append(graphs.stats().captures)
        (expected,) = draw(model, batcher(graphed=False), adapters, [asked])
        assert torch.equal(picture, expected), uses
    assert captures[0] < captures[1] == captures[2] < captures[3] == captures[4] == captures[5]
    for choice in ([first, second, []], [second, [], first]):
        together = [replace(request("flux", 0, uses), request_id=str(index)) for index, uses in enumerate(choice)]
        answers = draw(model, batcher(graphed=True, rows=3), adapters, together)
        captures.append(graphs.stats().captures)
        assert all(map(torch.equal, answers, draw(model, batcher(graphed=False, rows=3), adapters, together)))
    assert captures[-2] == captures[-1], "rows that change places read the same memory"
