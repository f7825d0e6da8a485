"""The batcher's promises: who runs together, who waits for whom, and who fails alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from safelight.protocol.replicas import BatchingMode
from safelight.worker.crossing.call import Call, OwnState, cross, yield_turn
from safelight.worker.crossing.coroutine import Cancelled, Coroutine
from safelight.worker.forward.batcher import Batcher
from safelight.worker.forward.prompt_cache import PromptCache
from safelight.worker.forward.resources import ForwardResources


class Doubler:
    """A component that doubles its rows and writes down how many it saw at once."""

    def __init__(self) -> None:
        self.forwards: list[list[float]] = []

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if bool((x < 0).any()):
            raise ValueError("negative")
        self.forwards.append([float(row[0]) for row in x])
        return x * 2


def batcher(*, max_batch: int = 16, max_tokens: int = 10**6, mode: BatchingMode = "merged") -> Batcher:
    return Batcher(max_batch=max_batch, max_tokens=max_tokens, mode=mode)


def request_body(component: Callable[..., Any], value: float, steps: int, width: int = 2) -> Callable[[], list[float]]:
    """Calls ``component`` ``steps`` times with a row of ``value`` and keeps what comes back."""

    def body() -> list[float]:
        rows = [torch.full((1, width), value) for _ in range(steps)]
        return [float(cross(Call("transformer", "__call__", component, (row,), {}))[0, 0]) for row in rows]

    return body


def request(component: Callable[..., Any], value: float, steps: int, width: int = 2, alone: bool = False) -> Coroutine:
    """A coroutine with such a body."""
    return Coroutine(request_body(component, value, steps, width), lambda _: None, alone=alone)


def drain(running: Batcher) -> None:
    while running.busy:
        running.step()


def test_requests_that_start_later_join_the_forwards_of_those_that_run() -> None:
    component, running = Doubler(), batcher()
    first = request(component, 1.0, 4)
    running.start(first)
    running.step()
    running.step()
    second = request(component, 5.0, 2)
    running.start(second)
    drain(running)
    assert (first.result, second.result) == ([2.0] * 4, [10.0] * 2)
    assert component.forwards == [[1.0], [1.0], [1.0, 5.0], [1.0, 5.0]]


def test_an_exclusive_coroutine_shares_the_batcher_with_no_other_and_its_time_comes() -> None:
    component, running = Doubler(), batcher()
    before = [request(component, value, 3) for value in (1.0, 2.0)]
    only = Coroutine(request_body(component, 5.0, 3), lambda _: None, exclusive=True)
    behind = [request(component, value, 3) for value in (6.0, 7.0)]
    for coroutine in (*before, only, *behind):
        running.start(coroutine)
    drain(running)
    assert component.forwards == [[1.0, 2.0]] * 3 + [[5.0]] * 3 + [[6.0, 7.0]] * 3
    assert only.result == [10.0] * 3


def test_no_shape_starves_while_another_keeps_coming() -> None:
    component, running = Doubler(), batcher()
    narrow = [request(component, 1.0, 10) for _ in range(2)]
    wide = request(component, 9.0, 10, width=3)
    for coroutine in [*narrow, wide]:
        running.start(coroutine)
    drain(running)
    kinds = [values[0] for values in component.forwards]
    assert 9.0 in kinds[:3]
    longest_wait = max(len(run) for run in "".join("w" if k == 9.0 else "n" for k in kinds[:20]).split("w"))
    assert longest_wait <= 2


def test_more_calls_than_fit_take_turns_so_that_all_advance_alike() -> None:
    component, running = Doubler(), batcher(max_batch=2)
    for value in (1.0, 2.0, 3.0):
        running.start(request(component, value, 6))
    drain(running)
    assert all(len(values) <= 2 for values in component.forwards)
    for end in range(2, 8):
        served = [sum(values.count(value) for values in component.forwards[:end]) for value in (1.0, 2.0, 3.0)]
        assert max(served) - min(served) <= 2, "one for taking turns, one for the start a turn later"


def test_a_group_that_comes_to_an_idle_batcher_makes_all_its_steps_together() -> None:
    """Also where its prompt is encoded first, once, and taken from the cache by the others."""
    component, encoder = Doubler(), Doubler()
    running = Batcher(max_batch=16, max_tokens=10**6, resources=ForwardResources(cache=PromptCache(2**20)))

    def sample(value: float) -> None:
        cross(Call("text_encoder", "__call__", encoder, (torch.full((1, 2), 7.0),), {}))
        for _ in range(3):
            cross(Call("transformer", "__call__", component, (torch.full((1, 2), value),), {}))

    for value in (1.0, 2.0, 3.0, 4.0, 5.0):
        running.start(Coroutine(functools.partial(sample, value), lambda _: None))
    drain(running)
    assert encoder.forwards == [[7.0]]
    assert [sorted(values) for values in component.forwards] == [[1.0, 2.0, 3.0, 4.0, 5.0]] * 3


def encoded(
    encoder: Doubler, denoiser: Doubler, decoder: Doubler, value: float, steps: int = 3, alone: bool = False
) -> Coroutine:
    """A coroutine that encodes a prompt of its own, makes ``steps`` steps and decodes."""

    def body() -> None:
        row = torch.full((1, 2), value)
        cross(Call("text_encoder", "__call__", encoder, (row,), {}))
        for _ in range(steps):
            cross(Call("transformer", "__call__", denoiser, (row,), {}))
        cross(Call("vae", "decode", decoder, (row,), {}))

    return Coroutine(body, lambda _: None, alone=alone)


def test_requests_that_arrive_one_by_one_within_a_forward_make_all_their_steps_together() -> None:
    """Before, the first ran ahead, and each of the others made steps alone and was decoded alone."""
    encoder, denoiser, decoder, running = Doubler(), Doubler(), Doubler(), batcher()
    for value in (1.0, 2.0, 3.0, 4.0):  # the next arrives while the prompt of the one before is being encoded
        running.start(encoded(encoder, denoiser, decoder, value))
        running.step()
    drain(running)
    assert encoder.forwards == [[1.0], [2.0], [3.0], [4.0]]
    assert [sorted(values) for values in denoiser.forwards] == [[1.0, 2.0, 3.0, 4.0]] * 3
    assert [sorted(values) for values in decoder.forwards] == [[1.0, 2.0, 3.0, 4.0]]


def test_one_that_finishes_is_decoded_although_others_keep_arriving() -> None:
    encoder, denoiser, decoder, running = Doubler(), Doubler(), Doubler(), batcher()
    running.start(encoded(encoder, denoiser, decoder, 1.0, steps=2))
    for value in range(2, 20):
        running.step()
        running.start(encoded(encoder, denoiser, decoder, float(value), steps=2))
    assert decoder.forwards[0][0] == 1.0
    drain(running)


@pytest.mark.parametrize(("mode", "alone"), [("merged", True), ("interleaved", False)])
def test_those_that_share_no_forward_pass_no_other(mode: BatchingMode, alone: bool) -> None:
    encoder, denoiser, decoder, running = Doubler(), Doubler(), Doubler(), batcher(mode=mode)
    running.start(encoded(encoder, denoiser, decoder, 1.0, alone=alone))
    for value in (2.0, 3.0, 4.0):
        running.step()
        running.start(encoded(encoder, denoiser, decoder, value, alone=alone))
    assert denoiser.forwards[:1] == [[1.0]]
    assert len(encoder.forwards) == 2, "each waits for its turn"
    drain(running)


def test_calls_of_another_kind_that_start_later_pass_others_only_once() -> None:
    """As with two denoisers, one for each half of the steps: the later half must not wait for all new requests."""
    early, late, running = Doubler(), Doubler(), batcher()

    def body(name: str, component: Doubler, steps: int) -> None:
        for _ in range(steps):
            cross(Call(name, "__call__", component, (torch.ones(1, 2),), {}))

    running.start(Coroutine(functools.partial(body, "transformer_2", late, 6), lambda _: None))
    running.step()
    for _ in range(6):
        running.start(Coroutine(functools.partial(body, "transformer", early, 6), lambda _: None))
        running.step()
    assert len(late.forwards) >= 2
    drain(running)


def test_the_token_budget_caps_a_forward_but_never_stops_a_single_call() -> None:
    component, running = Doubler(), batcher(max_tokens=5)
    for value in (1.0, 2.0, 3.0):
        running.start(request(component, value, 1, width=2))
    running.start(request(component, 4.0, 1, width=50))
    drain(running)
    assert sorted(map(len, component.forwards)) == [1, 1, 2]


def test_a_request_that_raises_inside_a_batch_fails_alone() -> None:
    component, running = Doubler(), batcher()
    good, bad, other = request(component, 1.0, 3), request(component, -1.0, 3), request(component, 2.0, 3)
    for coroutine in (good, bad, other):
        running.start(coroutine)
    drain(running)
    assert isinstance(bad.error, ValueError)
    assert (good.result, other.result) == ([2.0] * 3, [4.0] * 3)
    assert running.policy.unmergeable == {}


def test_a_component_that_only_takes_one_row_is_called_row_by_row_from_then_on() -> None:
    seen: list[int] = []

    def single(x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        if len(x) > 1:
            raise RuntimeError("one row only")
        return x + 1

    running = batcher()
    both = [request(single, 1.0, 3), request(single, 2.0, 3)]
    for coroutine in both:
        running.start(coroutine)
    drain(running)
    assert [c.result for c in both] == [[2.0] * 3, [3.0] * 3]
    assert seen.count(2) == 1, "the same kind of call is not tried again"
    assert running.policy.unmergeable == {}, "other kinds of calls to it still merge"


def test_deterministic_requests_share_no_forward() -> None:
    component, running = Doubler(), batcher()
    for value, alone in ((1.0, True), (2.0, False), (3.0, True), (4.0, False)):
        running.start(request(component, value, 2, alone=alone))
    drain(running)
    assert all(values in ([1.0], [3.0], [2.0], [4.0], [2.0, 4.0]) for values in component.forwards)


@pytest.mark.parametrize("mode", ["interleaved", "serial"])
def test_modes_without_merging_never_merge(mode: BatchingMode) -> None:
    component, running = Doubler(), batcher(mode=mode)
    for value in (1.0, 2.0):
        running.start(request(component, value, 2))
    drain(running)
    expected = {"interleaved": [[1.0], [2.0], [1.0], [2.0]], "serial": [[1.0], [1.0], [2.0], [2.0]]}
    assert component.forwards == expected[mode]


def test_a_cancelled_request_makes_no_further_call_and_its_neighbour_goes_on() -> None:
    component, running = Doubler(), batcher()
    doomed, survivor = request(component, 1.0, 100), request(component, 2.0, 5)
    running.start(doomed)
    running.start(survivor)
    running.step()
    running.cancel(doomed)
    drain(running)
    assert isinstance(doomed.error, Cancelled)
    assert survivor.result == [4.0] * 5
    assert sum(values.count(1.0) for values in component.forwards) == 1


def test_a_request_cancelled_by_its_neighbour_in_the_same_forward_still_ends() -> None:
    component, running = Doubler(), batcher()
    doomed = request(component, 2.0, 100)
    first = Coroutine(
        lambda: cross(Call("transformer", "__call__", component, (torch.ones(1, 2),), {})),
        lambda _: running.cancel(doomed),
    )
    running.start(first)
    running.start(doomed)
    drain(running)
    assert isinstance(doomed.error, Cancelled)
    assert component.forwards == [[1.0, 2.0]]


def test_a_request_cancelled_before_it_began_never_begins() -> None:
    component, running = Doubler(), batcher()
    coroutine = request(component, 1.0, 1)
    running.start(coroutine)
    running.cancel(coroutine)
    drain(running)
    assert component.forwards == []
    assert coroutine.finished


def test_a_request_that_fails_at_once_may_take_waiting_ones_along() -> None:
    component, running = Doubler(), batcher()
    second = request(component, 1.0, 1)

    def fails() -> None:
        raise ValueError("refused")

    running.start(Coroutine(fails, lambda _: running.cancel(second)))
    running.start(second)
    survivor = request(component, 3.0, 1)
    running.start(survivor)
    drain(running)
    assert isinstance(second.error, Cancelled)
    assert survivor.result == [6.0]


class Yielding:
    """The body of a coroutine that yields ``turns`` times, and then calls ``component``."""

    def __init__(self, component: Doubler, turns: int, changes: OwnState | None = None) -> None:
        self.taken = 0
        self._component, self._turns, self._changes = component, turns, changes

    def __call__(self) -> list[float]:
        for _ in range(self._turns):
            yield_turn(self._changes)
            self.taken += 1
        return request_body(self._component, 9.0, 1)()


def test_a_coroutine_that_yields_is_resumed_once_in_each_step_and_starves_no_forward() -> None:
    component, running = Doubler(), batcher()
    body, other = Yielding(component, 12), request(component, 1.0, 3)
    running.start(Coroutine(body, lambda _: None))
    running.start(other)
    taken = list[int]()
    while not other.finished:
        running.step()
        taken.append(body.taken)
    assert taken == list(range(len(taken))), "once in each step"
    assert component.forwards == [[1.0]] * 3
    drain(running)
    assert component.forwards[-1] == [9.0]


def test_coroutines_that_yield_once_still_share_the_next_forward_with_those_that_do_not() -> None:
    component, running = Doubler(), batcher()
    for body in (Yielding(component, 1), Yielding(component, 2), request_body(component, 1.0, 1)):
        running.start(Coroutine(body, lambda _: None))
    drain(running)
    assert [sorted(values) for values in component.forwards] == [[1.0], [9.0, 9.0]]


def test_a_coroutine_that_is_cancelled_while_it_yields_ends_at_once_also_by_another_that_yields() -> None:
    component, running = Doubler(), batcher()
    doomed = Coroutine(Yielding(component, 100), lambda _: None)
    by_another = Coroutine(Yielding(component, 100), lambda _: None)
    last = Coroutine(lambda: yield_turn(None), lambda _: running.cancel(by_another))
    for coroutine in (doomed, last, by_another):
        running.start(coroutine)
    running.step()
    running.cancel(doomed)
    assert isinstance(doomed.error, Cancelled)
    running.step()
    assert isinstance(by_another.error, Cancelled)
    assert not running.busy
    assert component.forwards == []


def test_an_operation_does_not_see_the_changes_of_a_coroutine_that_has_yielded() -> None:
    class Watched:
        hidden = 0

        @contextmanager
        def aside(self) -> Iterator[None]:
            self.hidden += 1
            yield

    changes, running = Watched(), batcher()
    running.start(Coroutine(Yielding(Doubler(), 5, changes), lambda _: None))
    running.step()
    with running.aside():
        assert changes.hidden == 1


def test_arguments_that_cannot_be_compared_run_alone_and_harm_nobody() -> None:
    class Odd:
        def __eq__(self, other: object) -> bool:
            raise TypeError("no")

        __hash__ = None  # type: ignore[assignment]

    def odd() -> Any:
        return cross(Call("vae", "decode", lambda x, y: x + 1, (torch.ones(2, 2), [Odd(), Odd()]), {}))

    component, running = Doubler(), batcher()
    strange, usual = Coroutine(odd, lambda _: None), request(component, 1.0, 2)
    running.start(strange)
    running.start(usual)
    drain(running)
    assert strange.result[0, 0] == 2
    assert usual.result == [2.0, 2.0]


def test_a_forward_too_large_for_the_memory_is_made_smaller_from_then_on() -> None:
    seen: list[int] = []

    def hungry(x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        if len(x) > 2:
            raise torch.OutOfMemoryError
        return x * 2

    running = batcher()
    coroutines = [request(hungry, float(value), 4) for value in range(1, 5)]
    for coroutine in coroutines:
        running.start(coroutine)
    drain(running)
    assert [c.result for c in coroutines] == [[2.0 * value] * 4 for value in range(1, 5)]
    assert sum(rows > 2 for rows in seen) <= 1


def test_a_pipeline_that_catches_every_exception_cannot_survive_its_cancellation() -> None:
    component, running = Doubler(), batcher()

    def stubborn() -> str:
        try:
            cross(Call("transformer", "__call__", component, (torch.ones(1, 2),), {}))
        except Exception:  # noqa: BLE001  # the point of this test
            return "caught"
        return "not cancelled"

    coroutine = Coroutine(stubborn, lambda _: None)
    running.start(coroutine)
    running.start(request(component, 2.0, 3))
    running.step()
    running.cancel(coroutine)
    drain(running)
    assert coroutine.result != "caught"


def test_requests_that_take_gradients_through_a_component_do_not_free_each_other_s_graph() -> None:
    weight = torch.arange(6.0).reshape(2, 3)

    def body(value: float) -> torch.Tensor:
        with torch.enable_grad():
            given = torch.full((1, 2), value).requires_grad_()
            answer = cross(Call("transformer", "__call__", lambda x: (x @ weight) ** 2, (given,), {}))
            return torch.autograd.grad(answer.sum(), given)[0]

    running, bodies = batcher(), [functools.partial(body, value) for value in (1.0, 2.0)]
    coroutines = [Coroutine(one, lambda _: None) for one in bodies]
    for one in coroutines:
        running.start(one)
    drain(running)
    assert [one.error for one in coroutines] == [None, None]
    assert all(torch.equal(one.result, alone()) for one, alone in zip(coroutines, bodies, strict=True))
