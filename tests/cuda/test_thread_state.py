"""The current device and stream of torch belong to the thread: a pipeline that changes them changes nobody else's."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch

from safelight.worker.crossing.call import Call, cross
from safelight.worker.crossing.coroutine import Cancelled, Coroutine
from safelight.worker.forward.batcher import Batcher

from .device import device, on_devices

pytestmark = on_devices

CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cuda", dtype=torch.bfloat16),
    "device": lambda: torch.cuda.device(device(1)),
    "stream": lambda: torch.cuda.stream(torch.cuda.Stream(device())),
}


def state() -> tuple[Any, ...]:
    return torch.cuda.current_device(), torch.cuda.current_stream(), torch.is_autocast_enabled("cuda")


def look(_: torch.Tensor) -> tuple[Any, ...]:
    return state()


def call() -> Any:
    return cross(Call("text_encoder", "look", look, (torch.ones(2, 3),), {}))


@pytest.mark.parametrize("name", CONTEXTS)
@pytest.mark.parametrize("cancelled", [False, True])
def test_a_context_around_a_call_reaches_the_call_and_nobody_else(name: str, cancelled: bool) -> None:
    def run() -> list[Any]:
        with CONTEXTS[name]():
            return [state(), call(), call()]

    neutral, batcher = state(), Batcher(max_batch=4, max_tokens=100, mode="interleaved")
    coroutines = [Coroutine(run, lambda _: None) for _ in range(2)]
    other = Coroutine(call, lambda _: None)
    for coroutine in (*coroutines, other):
        batcher.start(coroutine)
    batcher.step()
    assert state() == neutral
    if cancelled:
        batcher.cancel(coroutines[0])
    while batcher.busy:
        batcher.step()
        assert state() == neutral
    assert other.result == neutral
    assert isinstance(coroutines[0].error, Cancelled) == cancelled
    for coroutine in coroutines[cancelled:]:
        inside, *seen = coroutine.result
        assert inside != neutral
        assert seen == [inside, inside]
