"""Sizes that are captured before a replica is ready, and what enforcement refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from msgspec.structs import replace
from torch import nn

from safelight.protocol.errors import StartFailed
from safelight.protocol.forward_options import ForwardOptions
from safelight.protocol.generation import Generate, Sample
from safelight.tests.worker.graphs.recording import TapeRecorder
from safelight.tests.worker.graphs.test_pictures import new_graphs
from safelight.tests.worker.test_pipelines import plain, through_batcher
from safelight.worker.forward.batcher import Batcher
from safelight.worker.forward.graphs import GraphMiss
from safelight.worker.forward.resources import ForwardResources
from safelight.worker.graphs.graphs import Graphs
from safelight.worker.graphs.setting import check_denoisers, why_without_graphs
from safelight.worker.model.model import Model
from safelight.worker.rank.graph_warm_up import warm_up_graphs
from safelight.worker.requests.warm_up import WarmUpSize, read_sizes

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def warmed_up(model: Model, options: ForwardOptions, max_bytes: int = 10**10) -> Batcher:
    batcher = Batcher(
        max_batch=16, max_tokens=10**6, resources=ForwardResources(graphs=new_graphs(model, 100, max_bytes))
    )
    reports: list[str] = []
    warm_up_graphs(options, model, batcher, None, reports.append)
    return batcher


def test_sizes_are_captured_before_they_are_asked_for(tiny_model: Callable[[str], Model]) -> None:
    model = tiny_model("zimage")
    batcher = warmed_up(model, ForwardOptions(cuda_graph_sizes="64x64, 64x64x2", enforce_piecewise_cuda_graph=True))
    assert batcher.resources.graphs is not None
    captures = batcher.resources.graphs.stats().captures
    asked = [
        Generate(
            request_id=str(index),
            samples=[Sample(f"a red circle {index}", seed=index)],
            width=64,
            height=64,
            num_inference_steps=2,
        )
        for index in range(2)
    ]
    assert torch.equal(through_batcher(model, batcher, asked[:1])[0], plain(model, asked[0]))
    merged = through_batcher(model, Batcher(max_batch=16, max_tokens=10**6), asked)
    assert all(map(torch.equal, through_batcher(model, batcher, asked), merged))
    stats = batcher.resources.graphs.stats()
    assert (stats.captures, stats.misses, stats.eager) == (captures, 0, [])
    with pytest.raises(GraphMiss, match=r"of transformer has no CUDA graph .* is float32 \[.* and not float32 \["):
        through_batcher(model, batcher, [replace(asked[0], width=256, height=256)])


def test_a_block_without_a_graph_ends_an_enforced_start(tiny_model: Callable[[str], Model]) -> None:
    with pytest.raises(StartFailed, match="text_encoder_2: T5EncoderModel has no repeated blocks"):
        warmed_up(tiny_model("flux"), ForwardOptions(enforce_piecewise_cuda_graph=True))


def test_sizes_that_do_not_fit_together_end_an_enforced_start(tiny_model: Callable[[str], Model]) -> None:
    options = ForwardOptions(cuda_graph_sizes="64x64,128x128", enforce_piecewise_cuda_graph=True)
    with pytest.raises(StartFailed, match="need more than --cuda-graph-mb"):
        warmed_up(tiny_model("zimage"), options, 15 * 10**6)


def test_a_size_that_does_not_run_ends_the_start(tiny_model: Callable[[str], Model]) -> None:
    with pytest.raises(StartFailed, match="7x7x1 of --cuda-graph-sizes does not run"):
        warmed_up(tiny_model("sd3"), ForwardOptions(cuda_graph_sizes="7x7"))


def test_sizes_are_read() -> None:
    found = read_sizes("--sizes", " 64x32,8x8x4,8x8:5 ")
    assert found == [WarmUpSize(64, 32), WarmUpSize(8, 8, 4), WarmUpSize(8, 8, 1, 5)]
    for wrong in ("64", "64x", "64x64x0", "axb"):
        with pytest.raises(StartFailed, match=f"--sizes has '{wrong}'"):
            read_sizes("--sizes", wrong)


def test_graphs_are_on_where_cuda_is_and_refused_where_they_cannot_be() -> None:
    assert why_without_graphs(ForwardOptions(), CUDA) is None
    assert why_without_graphs(ForwardOptions(), CPU) == "the model runs on cpu, and CUDA graphs on a CUDA device"
    assert why_without_graphs(ForwardOptions(piecewise_cuda_graph="off"), CUDA) == "--piecewise-cuda-graph is off"
    for impossible in (
        ForwardOptions(piecewise_cuda_graph="on"),
        ForwardOptions(enforce_piecewise_cuda_graph=True),
    ):
        assert why_without_graphs(impossible, CUDA) is None
        with pytest.raises(StartFailed, match="is impossible: the model runs on cpu"):
            why_without_graphs(impossible, CPU)


def test_a_denoiser_without_blocks_is_an_error_only_where_graphs_are_asked_for() -> None:
    found = Graphs({"transformer": nn.Linear(2, 2)}, TapeRecorder(), None, max_bytes=1)
    check_denoisers(ForwardOptions(), found)
    assert found.stats().eager == ["transformer: Linear has no repeated blocks"]
    with pytest.raises(StartFailed, match="transformer: Linear has no repeated blocks; use auto"):
        check_denoisers(ForwardOptions(piecewise_cuda_graph="on"), found)
