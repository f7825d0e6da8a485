"""torch settings that a pipeline makes around a call affect that call alone, however the request ends."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry, attention_backend
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from safelight.worker.crossing.call import Call, cross
from safelight.worker.crossing.coroutine import Cancelled, Coroutine
from safelight.worker.crossing.thread_state import thread_state
from safelight.worker.forward.batcher import Batcher
from safelight.worker.forward.prompt_cache import PromptCache
from safelight.worker.forward.resources import ForwardResources

ONES = torch.ones(2, 3)


class Sixes(TorchFunctionMode):
    """Makes every product six times as large."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        return made * 6 if function is torch.mm else made


class Fives(TorchDispatchMode):
    """Makes every product five times as large, below autograd."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        return made * 5 if function is torch.ops.aten.mm.default else made


class DefaultDtype:
    def __enter__(self) -> None:
        torch.set_default_dtype(torch.float64)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(torch.float32)


CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast without a cache": lambda: torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False),
    "inference": torch.inference_mode,
    "gradients": torch.enable_grad,
    "device": lambda: torch.device("meta"),
    "function mode": Sixes,
    "default dtype": DefaultDtype,
    "attention kernel": lambda: sdpa_kernel([SDPBackend.MATH]),
    "attention kernels in an order": lambda: sdpa_kernel(
        [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION], set_priority=True
    ),
    "attention kernel of diffusers": lambda: attention_backend("_native_math"),
    "dispatch mode": Fives,
    "deterministic convolutions": lambda: torch.backends.cudnn.flags(enabled=False, deterministic=True),
    "no oneDNN": lambda: torch.backends.mkldnn.flags(enabled=False),
}


def component(x: torch.Tensor) -> tuple[Any, ...]:
    """torch's settings as a component sees them."""
    product = torch.mm(x, x.T)
    fresh = torch.ones(1)
    kernels = torch.backends.cuda.flash_sdp_enabled()
    seen = (product.dtype, product.is_inference(), float(product.sum()) if product.device.type == "cpu" else None)
    libraries = (torch.backends.cudnn.enabled, torch.backends.cudnn.deterministic, torch.backends.mkldnn.enabled)
    order = (_AttentionBackendRegistry.get_active_backend()[0], tuple(torch._C._get_sdp_priority_order()))
    return (*seen, fresh.dtype, fresh.device, torch.is_grad_enabled(), kernels, *libraries, *order)


def call(method: str = "look") -> Any:
    return cross(Call("text_encoder", method, component, (ONES,), {}))


def body(context: Callable[[], AbstractContextManager[Any]]) -> Callable[[], list[Any]]:
    def run() -> list[Any]:
        seen = [call()]
        with context():
            seen += [call(), call()]
        return [*seen, call()]

    return run


def drain(batcher: Batcher) -> None:
    while batcher.busy:
        batcher.step()


def plainly(context: Callable[[], AbstractContextManager[Any]]) -> list[Any]:
    """The component's view without a batcher."""
    outside = component(ONES)
    with context():
        inside = component(ONES)
    return [outside, inside, inside, outside]


@pytest.mark.parametrize("name", CONTEXTS)
def test_a_context_around_a_call_reaches_the_call_and_nobody_else(name: str) -> None:
    neutral, batcher = thread_state(), Batcher(max_batch=4, max_tokens=100, mode="interleaved")
    first, second, other = (Coroutine(body(made), lambda _: None) for made in (CONTEXTS[name],) * 2 + (nullcontext,))
    seen = []
    for coroutine in (first, other, second):
        batcher.start(coroutine)
    while batcher.busy:
        batcher.step()
        seen.append(thread_state())
    assert first.result == second.result == plainly(CONTEXTS[name])
    assert other.result == plainly(nullcontext)
    assert set(seen) == {neutral}


@pytest.mark.parametrize("name", CONTEXTS)
def test_two_that_overlap_and_one_that_is_cancelled_leave_no_setting_behind(name: str) -> None:
    neutral, batcher = thread_state(), Batcher(max_batch=4, max_tokens=100, mode="interleaved")
    coroutines = [Coroutine(body(CONTEXTS[name]), lambda _: None) for _ in range(3)]
    for coroutine in coroutines:
        batcher.start(coroutine)
    for _ in range(5):
        batcher.step()
    batcher.cancel(coroutines[0])
    drain(batcher)
    assert isinstance(coroutines[0].error, Cancelled)
    assert coroutines[1].result == coroutines[2].result == plainly(CONTEXTS[name])
    assert thread_state() == neutral


def test_a_setting_that_is_made_and_never_taken_back_ends_with_its_request() -> None:
    def run() -> Any:
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(True)
        torch.set_default_device("meta")
        torch.autocast("cpu", dtype=torch.bfloat16).__enter__()
        return call()

    neutral, batcher = thread_state(), Batcher(max_batch=4, max_tokens=100)
    setting = Coroutine(run, lambda _: None)
    batcher.start(setting)
    drain(batcher)
    assert setting.error is None
    assert setting.result[3:6] == (torch.float64, torch.device("meta"), True)
    assert thread_state() == neutral


def test_answers_in_autocast_are_not_given_to_who_asks_without() -> None:
    batcher = Batcher(max_batch=4, max_tokens=100, resources=ForwardResources(cache=PromptCache(10**6)))

    def encoder(x: torch.Tensor) -> torch.Tensor:
        return torch.mm(x, x.T)

    def run(context: AbstractContextManager[Any]) -> Any:
        with context:
            return cross(Call("text_encoder", "__call__", encoder, (ONES,), {})).dtype

    contexts = [torch.autocast("cpu", dtype=torch.bfloat16), nullcontext(), torch.autocast("cpu", dtype=torch.bfloat16)]
    coroutines = [Coroutine(lambda one=one: run(one), lambda _: None) for one in contexts]
    for coroutine in coroutines:
        batcher.start(coroutine)
    drain(batcher)
    assert [coroutine.result for coroutine in coroutines] == [torch.bfloat16, torch.float32, torch.bfloat16]


def test_calls_with_the_same_settings_still_meet() -> None:
    sizes, batcher = [], Batcher(max_batch=4, max_tokens=100)

    def denoiser(x: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x))
        return x * 2

    def run() -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return cross(Call("transformer", "__call__", denoiser, (ONES,), {}))

    for coroutine in [Coroutine(run, lambda _: None) for _ in range(2)]:
        batcher.start(coroutine)
    drain(batcher)
    assert sizes == [4]
