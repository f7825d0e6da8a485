"""Merging and splitting calls: every row must come back to the call that it came from."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from safelight.worker.anatomy import Anatomist, Anatomy
from safelight.worker.call import Call
from safelight.worker.merging import NotSplittable, merge, split


def call(*args: Any, method: str = "__call__", **kwargs: Any) -> Call:
    return Call("transformer", method, lambda *a, **k: None, args, kwargs)


def dissected(anatomist: Anatomist, *calls: Call) -> list[Anatomy]:
    parts = [anatomist.dissect(each) for each in calls]
    return [part for part in parts if part is not None]


def test_rows_of_different_counts_come_back_to_their_calls() -> None:
    one, two = torch.randn(1, 4, 3), torch.randn(2, 4, 3)
    parts = dissected(Anatomist(), call(hidden_states=one), call(hidden_states=two))
    assert parts[0].key == parts[1].key
    _, kwargs = merge(parts)
    assert kwargs["hidden_states"].shape == (3, 4, 3)
    outputs = split((kwargs["hidden_states"] * 2,), parts)
    assert torch.equal(outputs[0][0], one * 2)
    assert torch.equal(outputs[1][0], two * 2)


def test_a_timestep_without_dimensions_reaches_only_its_own_rows() -> None:
    parts = dissected(
        Anatomist(),
        call(torch.zeros(2, 4, 8, 8), torch.tensor(10.0)),
        call(torch.zeros(1, 4, 8, 8), torch.tensor(3.0)),
    )
    args, _ = merge(parts)
    assert args[1].tolist() == [10.0, 10.0, 3.0]


def test_lists_of_prompts_of_different_lengths_are_extended() -> None:
    a = call([torch.randn(16, 1, 4, 4)], torch.tensor([0.5]), [torch.randn(5, 8)])
    b = call([torch.randn(16, 1, 4, 4)], torch.tensor([0.1]), [torch.randn(9, 8)])
    parts = dissected(Anatomist(), a, b)
    assert parts[0].key == parts[1].key
    args, _ = merge(parts)
    assert [len(text) for text in args[2]] == [5, 9]
    outputs = split((args[0],), parts)
    assert torch.equal(outputs[1][0][0], b.args[0][0])


def test_residuals_in_a_list_are_merged_row_by_row_and_not_end_to_end() -> None:
    residuals = [torch.randn(2, 3), torch.randn(2, 5)]
    calls = [call(torch.randn(2, 4), residuals=[r.clone() for r in residuals]) for _ in range(2)]
    _, kwargs = merge(dissected(Anatomist(), *calls))
    assert [tuple(r.shape) for r in kwargs["residuals"]] == [(4, 3), (4, 5)]


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
    parts = dissected(Anatomist(), call(latents, **first), call(latents, **second))
    assert parts[0].key != parts[1].key


def test_equal_position_ids_of_two_requests_meet_though_they_are_two_tensors() -> None:
    parts = dissected(
        Anatomist(), *(call(torch.randn(1, 4, 3), img_ids=torch.arange(12.0).reshape(4, 3)) for _ in range(2))
    )
    assert parts[0].key == parts[1].key


def test_a_shared_tensor_that_was_written_to_is_compared_anew() -> None:
    anatomist, ids = Anatomist(), torch.zeros(4, 3)
    before = dissected(anatomist, call(torch.randn(1, 4, 3), img_ids=ids))[0]
    ids.add_(1)
    after = dissected(anatomist, call(torch.randn(1, 4, 3), img_ids=ids))[0]
    assert before.key != after.key


def test_methods_whose_rows_may_depend_on_each_other_have_no_anatomy() -> None:
    assert Anatomist().dissect(call(torch.zeros(1, 4), method="generate")) is None
    assert Anatomist().dissect(call("no tensors")) is None


def test_an_output_that_belongs_to_no_row_is_refused() -> None:
    parts = dissected(Anatomist(), call(torch.zeros(1, 4)), call(torch.zeros(1, 4)))
    for output in (torch.tensor(1.0), torch.zeros(3, 4), object()):
        with pytest.raises(NotSplittable):
            split((output,), parts)


def test_positions_count_tokens_and_latent_pixels() -> None:
    def positions(*args: Any) -> int:
        return dissected(Anatomist(), call(*args))[0].positions

    assert positions(torch.zeros(2, 77, dtype=torch.int64)) == 154
    assert positions(torch.zeros(2, 64, 32)) == 128
    assert positions(torch.zeros(2, 4, 8, 8)) == 128
    assert positions(torch.zeros(1, 16, 5, 8, 8)) == 320
    assert positions([torch.zeros(16, 1, 8, 8)] * 2) == 128
