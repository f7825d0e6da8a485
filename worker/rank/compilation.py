"""Compilation on a rank: the compiler for the model's components, and their warm-up before the replica is ready."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

from ...protocol.errors import StartFailed
from ...protocol.forward_options import ForwardOptions
from ..accuracy.judging import judge
from ..accuracy.policy import load_policy
from ..caching.caching import Caching
from ..compiling.compiler import Compiler
from ..forward.batcher import Batcher
from ..model.model import Model
from ..model.modules import modules
from ..parallel.mesh import Mesh
from ..pipelines.components import DENOISERS
from ..requests.warm_up import PROMPTS, read_sizes, run_size

log = logging.getLogger(__name__)

_OPTION = "--compile-sizes"


def check_compile(options: ForwardOptions) -> None:
    """Raise ``StartFailed`` for options that need compilation where it is off."""
    if options.compile == "off" and options.compile_text_encoders:
        raise StartFailed("--compile-text-encoders needs --compile on.")


def new_compiler(model: Model, options: ForwardOptions, mesh: Mesh) -> Compiler | None:
    """The compiler; ``None`` where nothing is compiled. Raises ``StartFailed`` for a denoiser without blocks."""
    if options.compile == "off":
        return None
    compiled = {
        name: module
        for name, module in modules(model.pipeline).items()
        if name in DENOISERS or (options.compile_text_encoders and name.startswith("text_encoder"))
    }
    compiler = Compiler(compiled, partial(judge, load_policy()), axes=[mesh.tp, mesh.axis("sp")])
    for name, reason in compiler.without_blocks.items():
        if name in DENOISERS:
            raise StartFailed(f"--compile on is impossible for {name}: {reason}; leave --compile out.")
    return compiler


def warm_up_compiled(
    options: ForwardOptions, model: Model, batcher: Batcher, caching: Caching, report: Callable[[str], None]
) -> None:
    """Run requests of the listed sizes, and wait until what they need is compiled. Raises ``StartFailed``."""
    sizes = read_sizes(_OPTION, options.compile_sizes)
    if not sizes:
        return
    if batcher.resources.compiled is None:
        log.warning("%s has no effect, because --compile is off", _OPTION)
        return
    if model.text is None:
        log.warning("%s has no effect, because the model draws from images; it is compiled as it serves", _OPTION)
        return
    for size in sizes:
        report(f"compiling for {size}")
        # a second length makes texts' lengths dynamic in all later graphs; batches of unequal ones need a third
        for prompt in PROMPTS if size is sizes[0] else PROMPTS[:1]:
            for _ in range(2):  # the second run shows that nothing is left, or reaches what the first one has not
                batcher.forget_answers()  # so that text encoders run
                run_size(model, batcher, caching, _OPTION, size, prompt)
                batcher.resources.compiled.wait()
