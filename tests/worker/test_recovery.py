"""A forward that does not fit into memory costs nobody a request, and no more than it must."""

from __future__ import annotations

import weakref
from functools import partial

import pytest
import torch

from safelight.worker.crossing.call import Call, cross
from safelight.worker.crossing.coroutine import Coroutine
from safelight.worker.forward.batcher import Batcher
from safelight.worker.forward.policy import FORWARDS_TO_RECOVER

ROW = 4


class Bounded:
    """A component that has memory for ``rows`` at once, activations and answers that somebody holds together."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.forwards: list[int] = []
        self._held: list[weakref.ref[torch.Tensor]] = []

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.forwards.append(len(x))
        activations = x * 2
        self._held.append(weakref.ref(activations))
        alive = [tensor for tensor in (ref() for ref in self._held) if tensor is not None]
        if sum(len(tensor) for tensor in alive) > self.rows:
            raise torch.OutOfMemoryError
        return activations


def drawn(component: Bounded, value: int, steps: int) -> Coroutine:
    """Like a pipeline, it keeps numbers and drops each answer."""

    def body() -> list[float]:
        rows = (torch.full((1, ROW), float(value)) for _ in range(steps))
        return [float(cross(Call("vae", "decode", component, (row,), {}))[0, 0]) for row in rows]

    return Coroutine(body, lambda _: None)


def run(batcher: Batcher, component: Bounded, number: int, steps: int = 1) -> list[Coroutine]:
    coroutines = [drawn(component, value, steps) for value in range(1, number + 1)]
    for coroutine in coroutines:
        batcher.start(coroutine)
    while batcher.busy:
        batcher.step()
    return coroutines


def test_no_request_of_a_group_too_large_for_the_memory_fails_where_each_fits_alone() -> None:
    batcher, component = Batcher(max_batch=16, max_tokens=10**6), Bounded(5)
    coroutines = run(batcher, component, 16)
    assert [(one.error, one.result) for one in coroutines] == [(None, [2.0 * value]) for value in range(1, 17)]
    assert component.forwards == [16, 8, 4, 4, 4, 4], "halves, and none that is known not to fit"


def test_one_that_fits_nowhere_fails_alone_and_holds_nothing_of_its_forward() -> None:
    batcher, component = Batcher(max_batch=16, max_tokens=10**6), Bounded(0)
    coroutines = run(batcher, component, 4)
    assert [type(one.error) for one in coroutines] == [torch.OutOfMemoryError] * 4
    component.rows = 4
    assert [one.error for one in run(batcher, component, 4)] == [None] * 4, "though the first errors are still held"


def test_a_cap_rises_again_when_memory_is_back() -> None:
    batcher, component = Batcher(max_batch=8, max_tokens=10**6), Bounded(1)
    run(batcher, component, 8)
    assert batcher.policy.caps == {"vae.decode": ROW}, "one row"
    component.rows = 8
    component.forwards.clear()
    run(batcher, component, 8, steps=5 * FORWARDS_TO_RECOVER)
    assert component.forwards[0] == 1
    assert component.forwards[-1] == 8
    assert component.forwards == sorted(component.forwards)
    assert batcher.policy.max_positions("vae.decode") >= 8 * ROW


@pytest.mark.parametrize("number", [1, 3])
def test_a_broken_device_is_not_blamed_on_a_request(number: int) -> None:
    """Every later use of the device fails in this process: the error ends the process's loop."""

    def broken(_: torch.Tensor) -> torch.Tensor:
        raise torch.AcceleratorError("device-side assert triggered")

    batcher = Batcher(max_batch=16, max_tokens=10**6)
    for value in range(number):
        row = torch.full((1, ROW), float(value))
        batcher.start(Coroutine(partial(cross, Call("vae", "decode", broken, (row,), {})), lambda _: None))
    with pytest.raises(torch.AcceleratorError):
        batcher.step()
