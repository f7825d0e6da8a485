"""Merging and splitting calls: every row must come back to the call that it came from."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils import BaseOutput
from torch.utils import _pytree as pytree

from safelight.worker.crossing.call import Call
from safelight.worker.forward.collate import NotDivisible, RowParts, collate
from safelight.worker.forward.signature import Batchable, Signatures


def call(*args: Any, method: str = "__call__", **kwargs: Any) -> Call:
    return Call("transformer", method, lambda *a, **k: None, args, kwargs)


def dissected(anatomist: Signatures, *calls: Call) -> list[Batchable]:
    parts = [anatomist.read(each) for each in calls]
    return [part for part in parts if part is not None]


def split(component: Callable[[torch.Tensor], Any], *rows: torch.Tensor) -> list[Any]:
    """Each call's share of one forward of ``component``, which also runs for the first call alone."""
    parts = dissected(Signatures(), *(call(each) for each in rows))
    return RowParts().uncollate(component(torch.cat(rows)), parts, lambda: component(rows[0]))


def test_rows_of_different_counts_come_back_to_their_calls() -> None:
    one, two = torch.randn(1, 4, 3), torch.randn(2, 4, 3)
    parts = dissected(Signatures(), call(hidden_states=one), call(hidden_states=two))
    assert parts[0].signature == parts[1].signature
    _, kwargs = collate(parts)
    assert kwargs["hidden_states"].shape == (3, 4, 3)
    outputs = split(lambda x: (x * 2,), one, two)
    assert torch.equal(outputs[0][0], one * 2)
    assert torch.equal(outputs[1][0], two * 2)


def test_a_timestep_without_dimensions_reaches_only_its_own_rows() -> None:
    parts = dissected(
        Signatures(),
        call(torch.zeros(2, 4, 8, 8), torch.tensor(10.0)),
        call(torch.zeros(1, 4, 8, 8), torch.tensor(3.0)),
    )
    args, _ = collate(parts)
    assert args[1].tolist() == [10.0, 10.0, 3.0]


def test_lists_of_prompts_of_different_lengths_are_extended() -> None:
    a = call([torch.randn(16, 1, 4, 4)], torch.tensor([0.5]), [torch.randn(5, 8)])
    b = call([torch.randn(16, 1, 4, 4)], torch.tensor([0.1]), [torch.randn(9, 8)])
    parts = dissected(Signatures(), a, b)
    assert parts[0].signature == parts[1].signature
    args, _ = collate(parts)
    assert [len(text) for text in args[2]] == [5, 9]
    outputs = RowParts().uncollate((args[0],), parts, lambda: (a.args[0],))
    assert torch.equal(outputs[1][0][0], b.args[0][0])


def test_residuals_in_a_list_are_merged_row_by_row_and_not_end_to_end() -> None:
    residuals = [torch.randn(2, 3), torch.randn(2, 5)]
    calls = [call(torch.randn(2, 4), residuals=[r.clone() for r in residuals]) for _ in range(2)]
    _, kwargs = collate(dissected(Signatures(), *calls))
    assert [tuple(r.shape) for r in kwargs["residuals"]] == [(4, 3), (4, 5)]


def test_arguments_inside_containers_and_those_after_them_keep_their_places() -> None:
    def one(value: float) -> Call:
        x = torch.full((1, 4), value)
        return call(x, ({"a": x + 1, "none": {}}, "flag"), 3, last=[x + 2, x + 3], end=None)

    args, kwargs = collate(dissected(Signatures(), one(0.0), one(10.0)))
    assert [leaf[:, 0].tolist() for leaf in (args[0], args[1][0]["a"])] == [[0.0, 10.0], [1.0, 11.0]]
    assert [leaf[:, 0].tolist() for leaf in kwargs["last"]] == [[2.0, 12.0], [3.0, 13.0]]
    assert (args[1][0]["none"], args[1][1], args[2]) == ({}, "flag", 3)
    assert [*kwargs] == ["last", "end"]
    assert kwargs["end"] is None


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param({"ids": torch.zeros(7, 3)}, {"ids": torch.ones(7, 3)}, id="shared tensors of other content"),
        pytest.param({"scale": 1.0}, {"scale": 2.0}, id="other flags"),
        pytest.param({"kwargs": {"a": 1}}, {"kwargs": {"b": 1}}, id="other names"),
        pytest.param({"x": torch.zeros(1, 4)}, {"x": torch.zeros(1, 5)}, id="other shapes"),
        pytest.param({"x": torch.zeros(1, 4)}, {"x": torch.zeros(1, 4).double()}, id="other dtypes"),
        pytest.param({"x": torch.zeros(1, 4)}, {"x": None}, id="a tensor and none"),
        pytest.param({"g": torch.Generator()}, {"g": torch.Generator()}, id="objects of their own"),
        pytest.param({"flag": True}, {"flag": 1}, id="true is not one"),
    ],
)
def test_calls_that_differ_in_what_rows_share_do_not_meet(first: dict[str, Any], second: dict[str, Any]) -> None:
    latents = torch.randn(1, 4, 3)
    parts = dissected(Signatures(), call(latents, **first), call(latents, **second))
    assert parts[0].signature != parts[1].signature


def test_equal_position_ids_of_two_requests_meet_though_they_are_two_tensors() -> None:
    parts = dissected(
        Signatures(), *(call(torch.randn(1, 4, 3), img_ids=torch.arange(12.0).reshape(4, 3)) for _ in range(2))
    )
    assert parts[0].signature == parts[1].signature


def test_a_shared_tensor_that_was_written_to_is_compared_anew() -> None:
    anatomist, ids = Signatures(), torch.zeros(4, 3)
    before = dissected(anatomist, call(torch.randn(1, 4, 3), img_ids=ids))[0]
    ids.add_(1)
    after = dissected(anatomist, call(torch.randn(1, 4, 3), img_ids=ids))[0]
    assert before.signature != after.signature


def test_methods_whose_rows_may_depend_on_each_other_have_no_signature() -> None:
    assert Signatures().read(call(torch.zeros(1, 4), method="generate")) is None
    assert Signatures().read(call("no tensors")) is None


def test_an_output_that_belongs_to_no_row_is_refused() -> None:
    one, two = torch.zeros(1, 4), torch.zeros(1, 4)
    for output in (torch.tensor(1.0), torch.zeros(3, 4), np.zeros((3, 4)), np.zeros(()), object(), {1, 2}):
        with pytest.raises(NotDivisible):
            split(lambda _, output=output: (output,), one, two)


class Named(NamedTuple):
    flags: list[bool]
    scores: tuple[float, ...]


@dataclass
class Checked(BaseOutput):
    flags: list[bool]
    images: torch.Tensor
    boxes: list[list[int]] | None = None


@pytest.mark.parametrize(
    "per_row",
    [
        pytest.param(lambda x: (x, [bool(row[0] > 0) for row in x]), id="flags in a list"),
        pytest.param(lambda x: (x, tuple(float(row[0]) for row in x)), id="numbers in a tuple"),
        pytest.param(lambda x: {"inner": ([str(float(row[0])) for row in x],)}, id="texts in a list in a dictionary"),
        pytest.param(lambda x: [{"score": float(row[0]), "found": row.tolist()} for row in x], id="a report per row"),
        pytest.param(lambda x: [x[i] if x[i, 0] > 0 else None for i in range(len(x))], id="a tensor or none per row"),
        pytest.param(lambda x: [list(row) for row in x], id="a list of tensors per row"),
        pytest.param(lambda x: x.numpy(), id="an array"),
        pytest.param(lambda x: (x[:, 0], x[:, :2, None]), id="tensors of other shapes"),
        pytest.param(lambda x: [row.numpy() for row in x], id="an array per row"),
        pytest.param(
            lambda x: Named([bool(row[0] > 0) for row in x], tuple(float(row[1]) for row in x)), id="a named tuple"
        ),
        pytest.param(
            lambda x: Checked([bool(row[0] > 0) for row in x], x, [[int(row[0])] for row in x]), id="an output class"
        ),
        pytest.param(lambda x: ([x * 2, x * 3], [x], x), id="a tensor per level, as many as rows or fewer"),
        pytest.param(lambda x: ([x.numpy(), x.numpy() * 2], [None, None], [None]), id="none per level"),
        pytest.param(lambda x: ([[row.tolist() for row in x], [row.sum() for row in x]],), id="rows within levels"),
    ],
)
@pytest.mark.parametrize("counts", [(1, 1), (1, 2), (2, 1)], ids=str)
def test_every_call_gets_its_own_rows_of_an_output_that_is_not_a_tensor(
    per_row: Callable[[torch.Tensor], Any], counts: tuple[int, ...]
) -> None:
    rows = torch.tensor([[1.0, 2.0, 3.0], [-4.0, 5.0, 6.0], [7.0, -8.0, 9.0]])[: sum(counts)].split(counts)
    for given, got in zip(rows, split(per_row, *rows), strict=True):
        assert alike(got, per_row(given))


@pytest.mark.parametrize(
    "of_all_rows",
    [
        pytest.param(lambda x: (x, [64, 64]), id="a list of numbers that is as long as there are rows"),
        pytest.param(lambda x: (x, (len(x), 2)), id="a shape"),
        pytest.param(lambda x: (x, float(x.sum())), id="a sum over all rows"),
        pytest.param(lambda x: (x, bool((x > 0).any())), id="a flag for all rows"),
        pytest.param(lambda x: {"sample": x, "kind": "image"}, id="a text"),
        pytest.param(lambda x: (x, {0: 1.0, 1: 2.0}), id="a dictionary by row"),
        pytest.param(lambda x: (x, [element for row in x for element in row.tolist()]), id="all rows in one list"),
        pytest.param(lambda x: (x, [float(row[0]) for row in x if row[0] > 0]), id="a list of some rows"),
        pytest.param(lambda x: (x, list(range(max(2, len(x))))), id="a list that is never shorter"),
        pytest.param(lambda x: (x, torch.tensor([0.5, 0.25])), id="a tensor for as many levels as there are rows"),
        pytest.param(lambda x: (x, np.array([0.5, 0.25])), id="an array for as many levels"),
        pytest.param(lambda x: (x, torch.stack([x, x * 2])), id="rows within as many levels, in one tensor"),
        pytest.param(lambda x: (x, torch.arange(2) if len(x) > 1 else x.sum()), id="a tensor, alone a number"),
        pytest.param(
            lambda x: DiagonalGaussianDistribution(torch.zeros(2, 2, 1, 1)), id="a distribution that is never shorter"
        ),
    ],
)
def test_a_value_that_cannot_be_attributed_to_a_row_is_given_to_no_call(
    of_all_rows: Callable[[torch.Tensor], Any],
) -> None:
    with pytest.raises(NotDivisible):
        split(of_all_rows, torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[-4.0, 5.0, 6.0]]))


def test_a_call_is_made_alone_once_to_see_what_its_lists_are() -> None:
    lists, seen = RowParts(), []
    for count in (2, 2, 3):
        rows = [torch.full((1, 3), float(number)) for number in range(count)]
        parts = dissected(Signatures(), *(call(each) for each in rows))

        def alone(rows: list[torch.Tensor] = rows) -> Any:
            seen.append(rows[0])
            return [0.0]

        assert (
            lists.uncollate([float(number) for number in range(count)], parts, alone) == [[0.0], [1.0], [2.0]][:count]
        )
    assert len(seen) == 1


def test_a_tensor_in_the_shape_of_what_came_in_needs_no_look_at_a_call_alone() -> None:
    """So no denoiser makes a forward more than before."""
    rows = [torch.full((1, 3), float(number)) for number in range(2)]
    parts = dissected(Signatures(), *(call(each) for each in rows))
    outputs = RowParts().uncollate((torch.cat(rows),), parts, lambda: pytest.fail("a call was made alone"))
    assert all(map(torch.equal, [output[0] for output in outputs], rows))


def alike(one: Any, other: Any) -> bool:
    """True if both have the same structure and the same values."""
    leaves, spec = pytree.tree_flatten(one)
    others, other_spec = pytree.tree_flatten(other)
    return spec == other_spec and all(
        type(a) is type(b) and (np.array_equal(a, b) if isinstance(a, torch.Tensor | np.ndarray) else a == b)
        for a, b in zip(leaves, others, strict=True)
    )


def test_positions_count_tokens_and_latent_pixels() -> None:
    def positions(*args: Any) -> int:
        return dissected(Signatures(), call(*args))[0].positions

    assert positions(torch.zeros(2, 77, dtype=torch.int64)) == 154
    assert positions(torch.zeros(2, 64, 32)) == 128
    assert positions(torch.zeros(2, 4, 8, 8)) == 128
    assert positions(torch.zeros(1, 16, 5, 8, 8)) == 320
    assert positions([torch.zeros(16, 1, 8, 8)] * 2) == 128


def test_an_output_whose_answers_are_copied_is_freed_without_a_collection() -> None:
    kept: list[weakref.ref[torch.Tensor]] = []

    def component(rows: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        output = rows * 2
        kept.append(weakref.ref(output))
        return output, [output]

    gc.disable()
    try:
        answers = split(component, torch.zeros(1, 3), torch.ones(1, 3))
        del answers
        assert [one() for one in kept] == [None] * len(kept)
    finally:
        gc.enable()
