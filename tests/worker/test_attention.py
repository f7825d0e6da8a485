"""The attention backend is one that runs here, is the one asked for, and leaves deterministic requests alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    attention_backend,
    dispatch_attention_fn,
)

from safelight.protocol.config import Config
from safelight.protocol.errors import StartFailed
from safelight.protocol.replicas import Attention
from safelight.protocol.self_test import SelfTestResult
from safelight.worker.crossing.call import Call, cross
from safelight.worker.crossing.coroutine import Coroutine
from safelight.worker.forward.batcher import Batcher
from safelight.worker.forward.resources import ForwardResources
from safelight.worker.model.attention import choose_attention, use_attention
from safelight.worker.self_test.self_test import SelfTest

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    before, _ = _AttentionBackendRegistry.get_active_backend()
    yield
    _AttentionBackendRegistry.set_active_backend(before)


def active() -> str:
    return _AttentionBackendRegistry.get_active_backend()[0].value


def test_a_cpu_keeps_plain_diffusers_attention() -> None:
    chosen = choose_attention("auto", CPU, torch.float32)
    assert (chosen.backend, chosen.deterministic) == ("native", "native")


def test_the_operator_s_own_variable_is_not_overridden() -> None:
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName._NATIVE_MATH)  # as DIFFUSERS_ATTN_BACKEND does
    chosen = choose_attention("auto", CPU, torch.float32)
    assert (chosen.backend, chosen.deterministic) == ("_native_math", "_native_math")


@pytest.mark.parametrize("wanted", ["_flash_3", "sage", "xformers", "_native_cudnn", "flash_hub", "quick"])
def test_a_backend_that_does_not_run_here_is_refused_with_those_that_do(wanted: str) -> None:
    with pytest.raises(
        StartFailed, match=rf"--attention-backend {wanted} cannot run on cpu .*available: .*native"
    ) as no:
        choose_attention(wanted, CPU, torch.float32)
    assert wanted not in no.value.message.partition("available: ")[2].rstrip(".").split(", ")


def test_a_backend_that_would_compute_on_one_rank_s_tokens_alone_is_refused() -> None:
    chosen = choose_attention("auto", CPU, torch.float32, shares_tokens=True)
    assert chosen.backend == "native"
    with pytest.raises(
        StartFailed, match=r"_native_math cannot run .* on one rank's tokens alone\); available: .*native"
    ):
        choose_attention("_native_math", CPU, torch.float32, shares_tokens=True)
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName._NATIVE_MATH)
    with pytest.raises(StartFailed, match=r"^DIFFUSERS_ATTN_BACKEND is _native_math, but .*--ulysses 1\.$"):
        choose_attention("auto", CPU, torch.float32, shares_tokens=True)


def test_every_request_but_a_deterministic_one_computes_with_the_chosen_backend() -> None:
    chosen = choose_attention("_native_math", CPU, torch.float32)
    use_attention(chosen)
    batcher = Batcher(max_batch=4, max_tokens=10**6, resources=ForwardResources(plain_attention=chosen.deterministic))
    seen: list[str] = []

    def component(x: torch.Tensor) -> torch.Tensor:
        seen.append(active())
        return x

    def call() -> Any:
        return cross(Call("transformer", "__call__", component, (torch.ones(1, 2),), {}))

    def with_its_own() -> Any:
        with attention_backend("_native_flash"):  # as a pipeline may do around its calls
            return call()

    for body, plain in ((call, False), (call, True), (with_its_own, False), (call, False)):
        batcher.start(Coroutine(body, lambda _: None, alone=True, plain=plain))
    while batcher.busy:
        batcher.step()
    assert sorted(seen) == ["_native_flash", "_native_math", "_native_math", "native"]


class NeedsNative(SelfTest):
    """A self-test of a pipeline whose transformer gives masks, which most fast kernels do not take."""

    def _run(self) -> SelfTestResult:
        if active() != "native":
            self._model.text = None
            raise StartFailed("makes nothing from a prompt")
        assert self._model.text is not None
        return SelfTestResult(mode="merged", unmergeable={}, text=None, image=None, no_image="")


def test_auto_returns_to_plain_attention_for_a_pipeline_that_cannot_use_its_choice(tiny_model: Any) -> None:
    model = tiny_model("flux")
    model.attention = Attention("_flash_3", "it is the fastest that runs here", "native")
    use_attention(model.attention)
    with pytest.raises(StartFailed):
        NeedsNative(model, Config(attention_backend="_flash_3")).run()
    text = model.text = tiny_model("flux").text
    NeedsNative(model, Config()).run()
    assert (model.attention.backend, active()) == ("native", "native")
    assert "nothing runs with _flash_3: makes nothing" in model.attention.reason
    assert model.text is text


def test_the_names_are_diffusers() -> None:
    query = torch.randn(1, 128, 2, 64)
    wanted = dispatch_attention_fn(query, query, query, backend=AttentionBackendName.NATIVE)
    for name in ("_native_math", "_native_flash"):
        use_attention(choose_attention(name, CPU, torch.float32))
        assert torch.allclose(dispatch_attention_fn(query, query, query), wanted, atol=1e-5)
