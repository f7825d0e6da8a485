"""The warm-up of a rank's graphs: it captures the listed sizes before the replica is ready, and enforces them."""

from __future__ import annotations

import logging
from collections.abc import Callable

from ...protocol.errors import StartFailed
from ...protocol.forward_options import ForwardOptions
from ..caching.caching import Caching
from ..forward.batcher import Batcher
from ..model.model import Model
from ..requests.warm_up import WarmUpSize, read_sizes, run_size

log = logging.getLogger(__name__)

_OPTION = "--cuda-graph-sizes"
_MODEL_S_OWN = WarmUpSize()


def warm_up_graphs(
    options: ForwardOptions, model: Model, batcher: Batcher, caching: Caching | None, report: Callable[[str], None]
) -> None:
    """Capture graphs for the sizes of ``options``; with enforcement, for the model's own size if none is listed.

    Raises ``StartFailed``: for a size that does not run, and with enforcement for a block that has no graph.
    """
    enforced = options.enforce_piecewise_cuda_graph
    sizes = read_sizes(_OPTION, options.cuda_graph_sizes) or ([_MODEL_S_OWN] if enforced else [])
    if not sizes:
        return
    if batcher.resources.graphs is None:
        log.warning("%s has no effect, because there are no CUDA graphs", _OPTION)
        return
    if model.text is None:
        if enforced:
            raise StartFailed("--enforce-piecewise-cuda-graph needs a model that takes a prompt alone for its warm-up.")
        log.warning("%s has no effect, because the model draws from images; it is captured as it serves", _OPTION)
        return
    with batcher.resources.graphs.recording():
        for size in sizes:
            report(f"capturing CUDA graphs for {size}")
            run_size(model, batcher, caching, _OPTION, size)
            batcher.forget_answers()  # the next size runs text encoders too
    if enforced:
        batcher.resources.graphs.enforce()
