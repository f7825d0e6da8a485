"""Compilation on a rank: the compiler for the model's denoisers, and their warm-up before the replica is ready."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

from ...protocol.config import Config
from ...protocol.errors import StartFailed
from ..accuracy.judging import judge
from ..accuracy.policy import load_policy
from ..caching.caching import Caching
from ..compiling.compiler import Compiler
from ..compiling.warm_up import WarmUpSize
from ..forward.batcher import Batcher
from ..model.model import Model
from ..model.modules import modules
from ..pipelines.components import DENOISERS
from ..requests.sample import SampleRun

log = logging.getLogger(__name__)


def new_compiler(model: Model, config: Config) -> Compiler | None:
    """The compiler, if there is to be one. Raises ``StartFailed`` if several ranks would have to switch together."""
    if config.compile == "off":
        return None
    if config.replica_ranks > 1:
        raise StartFailed(
            f"--compile on needs replicas of one rank, and --tp {config.tp} --ulysses {config.ulysses} makes "
            f"{config.replica_ranks}; use --replicas for further GPUs, or --compile off."
        )
    denoisers = {name: module for name, module in modules(model.pipeline).items() if name in DENOISERS}
    return Compiler(denoisers, partial(judge, load_policy()))


def warm_up(
    model: Model, batcher: Batcher, caching: Caching, sizes: Sequence[WarmUpSize], report: Callable[[str], None]
) -> None:
    """Run requests of these sizes, and wait until what they need is compiled. Raises ``StartFailed``."""
    if batcher.compiled is None or not sizes:
        return
    if model.text is None:
        log.warning("--compile-sizes has no effect, because the model draws from images; it is compiled as it serves")
        return
    for size in sizes:
        report(f"compiling for {size}")
        for _ in range(2):  # the second run shows that nothing is left, or reaches what the first one has not
            _run(model, batcher, size, caching)
            batcher.compiled.wait()


def _run(model: Model, batcher: Batcher, size: WarmUpSize, caching: Caching) -> None:
    request = size.request(takes_steps="num_inference_steps" in model.main.arguments)
    runs = [
        SampleRun(model, request, index, lambda *_: None, lambda _: None, caching=caching)
        for index in range(size.outputs)
    ]
    for run in runs:
        batcher.start(run.coroutine)
    while batcher.busy:
        batcher.step()
    for run in runs:
        if run.coroutine.error is not None:
            raise StartFailed(f"The size {size} of --compile-sizes does not run: {run.coroutine.error}.")
