"""Compilation on a rank: the compiler for the model's denoisers, and their warm-up before the replica is ready."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

from ...protocol.config import Config
from ...protocol.errors import StartFailed
from ...protocol.forward_options import ForwardOptions
from ..accuracy.judging import judge
from ..accuracy.policy import load_policy
from ..caching.caching import Caching
from ..compiling.compiler import Compiler
from ..forward.batcher import Batcher
from ..model.model import Model
from ..model.modules import modules
from ..pipelines.components import DENOISERS
from ..requests.warm_up import read_sizes, run_size

log = logging.getLogger(__name__)

_OPTION = "--compile-sizes"


def check_compile(config: Config) -> None:
    """Raise ``StartFailed`` if several ranks would have to switch to compiled blocks together."""
    if config.compile == "on" and config.replica_ranks > 1:
        halves = " --cfg-parallel" if config.cfg_parallel else ""
        raise StartFailed(
            f"--compile on needs replicas of one rank, and --tp {config.tp} --ulysses {config.ulysses}{halves} makes "
            f"{config.replica_ranks}; use --replicas for further GPUs, or --compile off."
        )


def new_compiler(model: Model, options: ForwardOptions) -> Compiler | None:
    """The compiler, if there is to be one."""
    if options.compile == "off":
        return None
    denoisers = {name: module for name, module in modules(model.pipeline).items() if name in DENOISERS}
    return Compiler(denoisers, partial(judge, load_policy()))


def warm_up_compiled(
    options: ForwardOptions, model: Model, batcher: Batcher, caching: Caching, report: Callable[[str], None]
) -> None:
    """Run requests of the listed sizes, and wait until what they need is compiled. Raises ``StartFailed``."""
    sizes = read_sizes(_OPTION, options.compile_sizes)
    if batcher.compiled is None or not sizes:
        return
    if model.text is None:
        log.warning("%s has no effect, because the model draws from images; it is compiled as it serves", _OPTION)
        return
    for size in sizes:
        report(f"compiling for {size}")
        for _ in range(2):  # the second run shows that nothing is left, or reaches what the first one has not
            run_size(model, batcher, caching, _OPTION, size)
            batcher.compiled.wait()
