"""Every stage around a component's call sees each forward once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from safelight.worker.crossing.call import Call, cross
from safelight.worker.crossing.coroutine import Coroutine
from safelight.worker.forward.batch import Forward
from safelight.worker.forward.batcher import Batcher
from safelight.worker.forward.prompt_cache import PromptCache
from safelight.worker.forward.resources import ForwardResources


class Counting:
    """A stage that notes how many calls each forward answers, and how many answers it has; probes are marked."""

    name = "counting"

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, bool]] = []

    def __call__(self, forward: Forward, proceed: Callable[[], list[Any]]) -> list[Any]:
        answers = proceed()
        self.seen.append((len(forward.calls), len(answers), forward.probe))
        return answers


def run(batcher: Batcher, component: Callable[..., Any], *values: float, name: str = "transformer") -> list[Any]:
    rows = [torch.full((1, 2), value) for value in values]
    coroutines = [
        Coroutine(partial(cross, Call(name, "__call__", component, (row,), {})), lambda _: None) for row in rows
    ]
    for coroutine in coroutines:
        batcher.start(coroutine)
    while batcher.busy:
        batcher.step()
    assert [coroutine.error for coroutine in coroutines] == [None] * len(coroutines)
    return [coroutine.result for coroutine in coroutines]


def counted(cache: PromptCache | None = None) -> tuple[Batcher, Counting]:
    batcher, stage = Batcher(max_batch=16, max_tokens=10**6, resources=ForwardResources(cache=cache)), Counting()
    batcher.runner.stages = [*batcher.runner.stages, stage]
    return batcher, stage


def test_a_merged_forward_is_one_and_so_is_a_call_alone() -> None:
    batcher, stage = counted()
    run(batcher, lambda x: x * 2, 1.0, 2.0, 3.0)
    run(batcher, lambda x: x * 2, 4.0)
    assert stage.seen == [(3, 3, False), (1, 1, False)]


def test_a_probe_is_marked_and_comes_within_the_forward_that_asks_for_it() -> None:
    batcher, stage = counted()
    answers = run(batcher, lambda x: [bool(row[0] > 1) for row in x], 1.0, 2.0)
    assert answers == [[False], [True]]
    assert stage.seen == [(1, 1, True), (2, 2, False)]


def test_an_answer_from_the_prompt_cache_passes_no_stage_below_it() -> None:
    batcher, stage = counted(PromptCache(10**6))
    first = run(batcher, lambda x: x * 2, 1.0, name="text_encoder")
    again = run(batcher, lambda x: x * 2, 1.0, name="text_encoder")
    assert torch.equal(first[0], again[0])
    assert stage.seen == [(1, 1, False)]
    assert [one.name for one in batcher.runner.stages] == [
        "random numbers",
        "prompt cache",
        "torch settings",
        "counting",
    ]
