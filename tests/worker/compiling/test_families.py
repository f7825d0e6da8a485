"""Blocks of real pipelines trace as a whole and draw the plain pipeline's picture, through the batcher's stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch

from safelight.protocol.generation import Generate, Sample
from safelight.tests.effort import chosen
from safelight.tests.tiny import FAMILIES
from safelight.worker.accuracy.judging import judge
from safelight.worker.accuracy.policy import load_policy
from safelight.worker.compiling.compiler import Compiler
from safelight.worker.forward.batcher import Batcher
from safelight.worker.forward.prompt_cache import PromptCache
from safelight.worker.forward.resources import ForwardResources
from safelight.worker.internals.blocks import NoBlocks, repeated_blocks
from safelight.worker.model.model import Model
from safelight.worker.model.modules import modules
from safelight.worker.pipelines.components import DENOISERS
from safelight.worker.requests.sample import SampleRun


def draw(model: Model, batcher: Batcher, *, deterministic: bool = False) -> torch.Tensor:
    size = {name: value for name, value in (("width", 64), ("height", 64)) if name in model.main.arguments}
    request = Generate(
        request_id="0", samples=[Sample("a red circle", 1)], num_inference_steps=2, deterministic=deterministic, **size
    )
    run = SampleRun(model, request, 0, lambda *_: None, lambda _: None)
    batcher.start(run.coroutine)
    while batcher.busy:
        batcher.step()
    assert run.coroutine.error is None, run.coroutine.error
    picture: torch.Tensor = run.coroutine.result
    return picture


def blocks(model: Model) -> set[str]:
    """The denoisers that have blocks: some tiny ones have a single block of each class."""
    found = set()
    for name in set(modules(model.pipeline)) & set(DENOISERS):
        try:
            repeated_blocks(modules(model.pipeline)[name])
        except NoBlocks:
            continue
        found.add(name)
    return found


def nearly(graph: torch.fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
    """A compiler whose graphs differ from the plain block in the last bits, as far as the rule admits."""
    return lambda *args: [value * (1 + 2e-6) if torch.is_floating_point(value) else value for value in graph(*args)]


def test_a_deterministic_request_gets_no_answer_of_a_compiled_text_encoder(tiny_model: Callable[[str], Model]) -> None:
    """Z-Image reads hidden states, which transformers collects by hooks."""
    model = tiny_model("zimage")
    plain = draw(model, Batcher(max_batch=4, max_tokens=10**6))
    encoder = modules(model.pipeline)["text_encoder"]
    compiler = Compiler({"text_encoder": encoder}, partial(judge, load_policy()), nearly)
    cache = PromptCache(2**20, compiled=True)
    batcher = Batcher(max_batch=4, max_tokens=10**6, resources=ForwardResources(cache=cache, compiled=compiler))
    for _ in range(2):
        cache.clear()
        eager = compiler.stats()["text_encoder"].eager_calls
        fast = draw(model, batcher)
        compiler.wait()
    assert compiler.stats()["text_encoder"].eager_calls == eager
    assert not torch.equal(fast, plain)
    assert torch.equal(draw(model, batcher), fast), "the cache answers"
    assert torch.equal(draw(model, batcher, deterministic=True), plain)


NIGHTLY = [name for name in FAMILIES if name not in ("pixart", "sd15_pag", "sd3_pag", "qwenimage_edit")]


@pytest.mark.parametrize("name", chosen("pixart", nightly=NIGHTLY))
def test_a_compiled_pipeline_draws_what_the_plain_one_does(name: str, tiny_model: Callable[[str], Model]) -> None:
    model = tiny_model(name)
    with_blocks = blocks(model)
    denoisers = {name: part for name, part in modules(model.pipeline).items() if name in DENOISERS}
    plain = draw(model, Batcher(max_batch=4, max_tokens=10**6))
    compiler = Compiler(denoisers, partial(judge, load_policy()), "eager")
    batcher = Batcher(max_batch=4, max_tokens=10**6, resources=ForwardResources(compiled=compiler))
    for _ in range(2):
        assert torch.equal(draw(model, batcher), plain)
        compiler.wait()
    before = {name: stats.eager_calls for name, stats in compiler.stats().items()}
    assert torch.equal(draw(model, batcher), plain)
    calls = {name: stats.calls for name, stats in compiler.stats().items()}
    assert torch.equal(draw(model, batcher, deterministic=True), plain)
    for component, stats in compiler.stats().items():
        if component in with_blocks:
            assert (stats.state, stats.reason) == ("compiled", None)
            assert stats.eager_calls == before[component]
        assert stats.calls == calls[component], "a deterministic request runs plain blocks"
