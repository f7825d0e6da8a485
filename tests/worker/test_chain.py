"""Interceptors between a call and the batcher, and coroutines that wait for several calls at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from safelight.worker.crossing.call import Call
from safelight.worker.crossing.chain import Chain, Proceed
from safelight.worker.crossing.coroutine import Cancelled, Coroutine
from safelight.worker.forward.batcher import Batcher

from .test_batcher import Doubler


def paired(other: float, width: int = 2) -> Callable[[Call, Proceed], Any]:
    """Makes each call together with one of ``other``, and answers with the difference, as guidance does."""

    def intercept(call: Call, proceed: Proceed) -> Any:
        beside = Call(call.component, call.method, call.function, (torch.full((1, width), other),), {})
        one, two = proceed(call, beside)
        return one - two[:, : one.shape[1]]

    return intercept


def asking(component: Doubler, chain: Chain, values: list[float], done: Callable[..., None] = lambda _: None) -> Any:
    def body() -> list[float]:
        calls = (Call("transformer", "__call__", component, (torch.full((1, 2), value),), {}) for value in values)
        return [float(chain(call)[0, 0]) for call in calls]

    return Coroutine(body, done)


def run(*coroutines: Coroutine) -> None:
    batcher = Batcher(max_batch=16, max_tokens=10**6)
    for coroutine in coroutines:
        batcher.start(coroutine)
    while batcher.busy:
        batcher.step()


def test_two_calls_of_one_coroutine_are_one_forward_which_others_join() -> None:
    component = Doubler()
    guided, plain = asking(component, Chain([paired(5.0)]), [1.0, 2.0]), asking(component, Chain(), [7.0, 8.0])
    run(guided, plain)
    assert (guided.result, plain.result) == ([-8.0, -6.0], [14.0, 16.0])
    assert component.forwards == [[1.0, 5.0, 7.0], [2.0, 5.0, 8.0]]


def test_two_calls_that_cannot_meet_are_waited_for_both() -> None:
    component = Doubler()
    guided = asking(component, Chain([paired(5.0, width=3)]), [1.0])
    run(guided)
    assert guided.result == [-8.0]
    assert component.forwards == [[1.0], [5.0]]


@pytest.mark.parametrize("values", [(-1.0, 5.0), (1.0, -5.0)])
def test_if_one_of_two_calls_fails_the_coroutine_hears_of_it_once_and_nobody_else(values: tuple[float, float]) -> None:
    component, ended = Doubler(), list[Coroutine]()
    failing = asking(component, Chain([paired(values[1])]), [values[0], 1.0], ended.append)
    plain = asking(component, Chain(), [7.0, 8.0])
    run(failing, plain)
    assert isinstance(failing.error, ValueError)
    assert ended == [failing]
    assert plain.result == [14.0, 16.0]


def test_a_coroutine_that_is_cancelled_between_two_answers_ends_once() -> None:
    component, ended = Doubler(), list[Coroutine]()
    batcher = Batcher(max_batch=16, max_tokens=10**6)
    guided = asking(component, Chain([paired(5.0, width=3)]), [1.0], ended.append)
    batcher.start(guided)
    batcher.step()
    assert component.forwards == [[1.0]], "the other one waits"
    batcher.cancel(guided)
    assert isinstance(guided.error, Cancelled)
    while batcher.busy:
        batcher.step()
    assert ended == [guided]
    assert component.forwards == [[1.0]]


def test_a_coroutine_that_is_cancelled_by_another_calls_answer_ends_once() -> None:
    component, ended = Doubler(), list[Coroutine]()
    batcher = Batcher(max_batch=16, max_tokens=4)  # two calls
    guided = asking(component, Chain([paired(5.0)]), [1.0], ended.append)
    canceller = asking(component, Chain(), [7.0], lambda _: batcher.cancel(guided))
    batcher.start(canceller)  # first in line: it meets one of the two, and the other waits
    batcher.start(guided)
    while batcher.busy:
        batcher.step()
    assert component.forwards == [[7.0, 1.0]]
    assert isinstance(guided.error, Cancelled)
    assert ended == [guided]


def test_interceptors_stand_around_each_other_in_order() -> None:
    seen = list[str]()

    def named(name: str) -> Callable[[Call, Proceed], Any]:
        def intercept(call: Call, proceed: Proceed) -> Any:
            seen.append(f"{name} in")
            (answer,) = proceed(call)
            seen.append(f"{name} out")
            return answer + 1

        return intercept

    component, chain = Doubler(), Chain([named("first")])
    chain.add(named("second"))
    coroutine = asking(component, chain, [1.0])
    run(coroutine)
    assert seen == ["first in", "second in", "second out", "first out"]
    assert coroutine.result == [4.0]


def test_an_interceptor_may_answer_without_a_forward() -> None:
    component = Doubler()
    coroutine = asking(component, Chain([lambda call, _: call.args[0] * 3]), [1.0, 2.0])
    run(coroutine)
    assert coroutine.result == [3.0, 6.0]
    assert component.forwards == []
