"""Options of compilation that cannot hold are refused at the start, in a sentence."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from safelight.protocol.config import Config
from safelight.protocol.errors import StartFailed
from safelight.worker.graphs.setting import why_without_graphs
from safelight.worker.model.model import Model
from safelight.worker.rank.compilation import check_compile, new_compiler


def test_several_ranks_are_refused_and_off_makes_no_compiler(tiny_model: Callable[[str], Model]) -> None:
    model = tiny_model("flux")
    assert new_compiler(model, Config()) is None
    check_compile(Config(compile="on", replicas=2))
    for config, words in (
        (Config(compile="on", tp=2, ulysses=2), r"--compile on needs replicas of one rank.* makes 4; use --replicas"),
        (Config(compile="on", cfg_parallel=True), "--tp 1 --ulysses 1 --cfg-parallel makes 2;"),
    ):
        with pytest.raises(StartFailed, match=words):
            check_compile(config)


def test_graphs_of_cuda_give_way_to_compilation_and_both_by_force_are_refused() -> None:
    device = torch.device("cuda")
    assert why_without_graphs(Config(), device) is None
    assert "--compile is on" in str(why_without_graphs(Config(compile="on"), device))
    with pytest.raises(StartFailed, match="--piecewise-cuda-graph on is impossible: --compile is on"):
        why_without_graphs(Config(compile="on", piecewise_cuda_graph="on"), device)
