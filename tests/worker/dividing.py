"""Each rank's part in tests of row division; in a module that other processes can import."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from safelight.tests.worker import splitting
from safelight.worker.crossing.call import Call, cross
from safelight.worker.crossing.coroutine import Coroutine
from safelight.worker.forward.batcher import Batcher
from safelight.worker.forward.resources import ForwardResources
from safelight.worker.forward.row_division import RowDivision
from safelight.worker.forward.timing import Timing
from safelight.worker.parallel.mesh import Mesh


def divides_rows(mesh: Mesh, families: Sequence[splitting.Drawn]) -> None:
    """One start of all ranks for all of it, since starting takes longer."""
    for divides in (
        requests_that_meet,
        measured_times,
        halves_of_one_call,
        lists,
        one_row,
        text_encoders,
        random_numbers,
        outputs_without_rows,
        a_division_of_several_batchers,
        pictures_of_different_sizes,
        a_row_that_fails_on_one_rank,
        no_memory_for_one_part,
    ):
        divides(mesh)
    splitting.draws_as_one_rank(mesh, families)


class Component:
    """A component that doubles its rows, and the rows that this rank computed in each of its forwards."""

    def __init__(self, check: Callable[[Any], None] = lambda _: None) -> None:
        self.rows: list[int] = []
        self._check = check

    def __call__(self, rows: Any, scale: torch.Tensor | None = None) -> tuple[Any]:
        self.rows.append(len(rows))
        self._check(rows)
        doubled = [row * 2 for row in rows] if isinstance(rows, list) else rows * 2
        return (doubled,)


def answers(
    mesh: Mesh,
    component: Callable[..., Any],
    *inputs: Any,
    name: str = "transformer",
    alone: bool = False,
    timing: Timing | None = None,
    division: RowDivision | None = None,
) -> tuple[list[Any], Batcher]:
    """The answers to one call of each input, made together, or the exceptions."""
    resources = ForwardResources(timing=timing, division=division or RowDivision.of(mesh, timing))
    batcher = Batcher(max_batch=16, max_tokens=10**6, agree=mesh.agree, resources=resources)
    calls = [Call(name, "__call__", component, (rows,), {"scale": torch.tensor(3.0)}) for rows in inputs]
    coroutines = [Coroutine(partial(cross, call), lambda _: None, alone=alone) for call in calls]
    for coroutine in coroutines:
        batcher.start(coroutine)
    while batcher.busy:
        batcher.step()
    return [coroutine.error or coroutine.result[0] for coroutine in coroutines], batcher


def rows(number: int, first: float = 0.0) -> torch.Tensor:
    return torch.arange(first, first + number)[:, None].expand(number, 2).contiguous()


def requests_that_meet(mesh: Mesh) -> None:
    component = Component()
    found, batcher = answers(mesh, component, rows(1), rows(1, 5.0), rows(1, 7.0))
    assert torch.equal(torch.cat(found), torch.tensor([[0.0, 0.0], [10.0, 10.0], [14.0, 14.0]]))
    assert component.rows == [2], "two of three rows, so that both ranks compute as many"
    assert (batcher.runner.counters.divided, batcher.runner.counters.forwards) == (1, 1)


def measured_times(mesh: Mesh) -> None:
    timing = Timing(torch.device("cpu"), 16, 0.1)
    answers(mesh, Component(), rows(1), rows(1, 5.0), timing=timing)
    (limit,) = timing.merge_limits()
    assert list(limit.seconds) == ["2"], "of the forward of two outputs, and not of this rank's one"


def halves_of_one_call(mesh: Mesh) -> None:
    component = Component()
    found, _ = answers(mesh, component, rows(2), rows(2, 4.0), rows(2, 8.0))
    assert [one.tolist() for one in found] == [(rows(2, first) * 2).tolist() for first in (0.0, 4.0, 8.0)]
    assert component.rows == [3], "the call in the middle is cut"
    alone = Component()
    (found,), _ = answers(mesh, alone, rows(2))
    assert torch.equal(found, rows(2) * 2)
    assert alone.rows == [1]


def lists(mesh: Mesh) -> None:
    component = Component()
    (found, other), _ = answers(mesh, component, [rows(3)], [rows(3, 9.0)])
    assert [len(found), len(other), component.rows] == [1, 1, [1]]
    assert torch.equal(other[0], rows(3, 9.0) * 2)


def pictures_of_different_sizes(mesh: Mesh) -> None:
    component = Component()
    (found, other), batcher = answers(mesh, component, [rows(3)], [rows(5)])
    assert [tuple(found[0].shape), tuple(other[0].shape)] == [(3, 2), (5, 2)]
    assert component.rows[0] == 2, "whole at once"
    assert batcher.runner.counters.divided == 0


def one_row(mesh: Mesh) -> None:
    component = Component()
    answers(mesh, component, rows(1))
    answers(mesh, component, rows(2), alone=True)
    assert component.rows == [1, 2], "a deterministic call runs as the pipeline made it"


def text_encoders(mesh: Mesh) -> None:
    component = Component()
    answers(mesh, component, rows(2), name="text_encoder")
    assert component.rows == [2]


def random_numbers(mesh: Mesh) -> None:
    def draws(rows: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor]:
        seen.append(len(rows))
        return (rows + torch.rand_like(rows),)

    seen: list[int] = []
    torch.manual_seed(4)
    (found,), batcher = answers(mesh, draws, rows(2))
    torch.manual_seed(4)
    assert torch.equal(found, rows(2) + torch.rand(2, 2)), "as on one rank"
    assert seen == [1, 2]
    assert batcher.runner.counters.divided == 0


def outputs_without_rows(mesh: Mesh) -> None:
    def sums(rows: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor]:
        seen.append(len(rows))
        return (rows.sum(),)

    seen: list[int] = []
    (found,), _ = answers(mesh, sums, rows(2))
    assert (float(found), seen) == (2.0, [1, 2])


def a_division_of_several_batchers(mesh: Mesh) -> None:
    def sums(rows: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor]:
        seen.append(len(rows))
        return (rows.sum(),)

    seen: list[int] = []
    division = RowDivision.of(mesh)
    _, first = answers(mesh, Component(), rows(2), division=division)
    _, second = answers(mesh, sums, rows(2), division=division)
    answers(mesh, sums, rows(2), division=division)
    assert seen == [1, 2, 2], "the last one is whole at once, as the self-test and the engine share what was learned"
    assert [batcher.runner.counters.divided for batcher in (first, second)] == [1, 0]


def a_row_that_fails_on_one_rank(mesh: Mesh) -> None:
    def check(rows: torch.Tensor) -> None:
        if (rows == 7.0).any():
            raise ValueError("a bad row")

    component = Component(check)
    (bad, good), _ = answers(mesh, component, rows(1, 7.0), rows(1, 3.0))
    assert isinstance(bad, ValueError)
    assert torch.equal(good, rows(1, 3.0) * 2)
    assert component.rows == [1, 2, 1, 1], "half, whole, and each alone"


def no_memory_for_one_part(mesh: Mesh) -> None:
    def check(rows: torch.Tensor) -> None:
        if len(rows) > 1 or (mesh.axis("cfg").rank == 1 and len(component.rows) == 1):
            raise torch.OutOfMemoryError

    component = Component(check)
    found, _ = answers(mesh, component, rows(1), rows(1, 3.0))
    assert torch.equal(torch.cat(found), torch.tensor([[0.0, 0.0], [6.0, 6.0]]))
    assert component.rows == [1, 2, 1, 1], "half, whole, and then smaller forwards"
