"""A rank's graphs, or the reason why it has none: its options, or its device."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from ...protocol.errors import StartFailed
from ...protocol.forward_options import ForwardOptions
from ...protocol.replicas import GraphStats
from ..forward.adapters import Adapters
from ..forward.graphs import Graphs as GraphsOfForwards
from ..pipelines.components import DENOISERS
from .cuda_recorder import CudaRecorder
from .graphs import Graphs


def why_without_graphs(options: ForwardOptions, device: torch.device) -> str | None:
    """Why there are no graphs; ``None`` if there are. Raises ``StartFailed`` for what cannot be."""
    reason = None
    if options.piecewise_cuda_graph == "off":
        reason = "--piecewise-cuda-graph is off"
    elif options.compile == "on":
        reason = "--compile is on, whose blocks are not captured"
    elif options.offload != "off":
        reason = "--offload moves the weights"
    elif device.type != "cuda":
        reason = f"the model runs on {device}, and CUDA graphs on a CUDA device"
    if reason is not None and options.piecewise_cuda_graph == "on":
        raise StartFailed(f"--piecewise-cuda-graph on is impossible: {reason}; use auto.")
    if reason is not None and options.enforce_piecewise_cuda_graph:
        raise StartFailed(f"--enforce-piecewise-cuda-graph is impossible: {reason}; drop it.")
    return reason


def new_graphs(
    options: ForwardOptions,
    device: torch.device,
    components: Mapping[str, nn.Module],
    adapters: Adapters | None,
    *,
    is_alone: bool,
) -> Graphs | None:
    """The graphs of the denoisers and text encoders among ``components``, if the rank has any.

    A rank that ``is_alone`` may run a forward again after it ran out of memory; others would wait in its collectives.
    """
    if why_without_graphs(options, device) is not None:
        return None
    graphed = {name: part for name, part in components.items() if name in DENOISERS or name.startswith("text_encoder")}
    max_bytes = options.cuda_graph_mb * 1_000_000
    graphs = Graphs(graphed, CudaRecorder(device), adapters, max_bytes=max_bytes, retries=is_alone)
    check_denoisers(options, graphs)
    return graphs


def check_denoisers(options: ForwardOptions, graphs: Graphs) -> None:
    """Raises ``StartFailed`` if graphs are asked for and a denoiser can have none; ``auto`` only reports it."""
    without = [f"{name}: {reason}" for name, reason in graphs.without_blocks.items() if name in DENOISERS]
    if without and options.piecewise_cuda_graph == "on":
        raise StartFailed(f"--piecewise-cuda-graph on is impossible: {without[0]}; use auto.")


def stats_of_graphs(
    graphs: GraphsOfForwards | None, options: ForwardOptions, device: torch.device
) -> Callable[[], GraphStats]:
    """Reads what a rank reports about its graphs, or why it has none."""
    if graphs is not None:
        return graphs.stats
    without = GraphStats(state="off", reason=why_without_graphs(options, device) or "")
    return lambda: without
