"""Comparing a component with its library's reports every fault, and leaves nothing behind."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

from safelight.protocol.config import Config
from safelight.protocol.errors import StartFailed
from safelight.worker.accuracy import compare, verification
from safelight.worker.accuracy.policy import load_policy
from safelight.worker.accuracy.recorded import CannotKeep, Recorded, read, write
from safelight.worker.accuracy.report import ReportRow
from safelight.worker.accuracy.sides import Component, plain
from safelight.worker.accuracy.verification import Checkpoint, chosen
from safelight.worker.model.model import load_model
from safelight.worker.parallel.ranks import ALONE
from safelight.worker.weights.checkpoint.components import component_classes

from .families import CPU, recorded, rows

VAE = ("vae",)


def vae_rows(flux: Path, staged: bool | None = None) -> list[ReportRow]:
    return rows(ALONE, flux, chosen(component_classes(flux), VAE), "bfloat16", staged=staged)


def altered(change: Callable[[nn.Module], object]) -> Any:
    """The runtime's component, changed after it was loaded."""
    load = compare.runtime

    def wrong(*args: Any, **options: Any) -> nn.Module:
        module = load(*args, **options)
        change(module)
        return module

    return patch.object(compare, "runtime", wrong)


def test_a_nan_is_a_fault_and_named(flux: Path) -> None:
    with altered(lambda module: module.get_parameter("decoder.conv_out.bias").fill_(torch.nan)):
        found = {row.call: row for row in vae_rows(flux)}
    assert (found["vae.decode"].status, found["vae.decode"].note) == ("failed", "NaN or Inf")
    assert found["vae.encode"].status == "passed"


@pytest.mark.parametrize(("spread", "measure"), [(1.0, "bias"), (1e-4, "largest error")])
def test_an_error_that_only_one_measure_shows_is_caught(spread: float, measure: str, flux: Path) -> None:
    """Half of plain's RMS error, added to every number; and twice its largest error, added to very few."""
    (row,) = (row for row in vae_rows(flux) if row.call == "vae.decode")
    assert row.plain is not None
    added = row.plain.rms / 2 if spread == 1.0 else row.plain.max_abs * 2

    def wrong(output: torch.Tensor) -> torch.Tensor:
        numbers = output.float().flatten()
        numbers[: max(1, int(len(numbers) * spread))] += added
        return numbers.view_as(output)

    with altered(lambda module: module.decoder.register_forward_hook(lambda _, args, output: wrong(output))):
        (row,) = (row for row in vae_rows(flux) if row.call == "vae.decode")
    assert (row.status, row.note.startswith(measure)) == ("failed", True), row.note


def test_a_reference_that_is_not_finite_is_a_fault_and_said_to_be_the_reference(flux: Path) -> None:
    load = compare.plain

    def infinite(*args: Any) -> nn.Module:
        module = load(*args)
        module.get_parameter("decoder.conv_out.bias").fill_(torch.inf)
        return module

    with patch.object(compare, "plain", infinite):
        found = {row.call: row for row in rows(ALONE, flux, chosen(component_classes(flux), VAE), "float32")}
    assert (found["vae.decode"].status, found["vae.decode"].note) == ("failed", "the reference has NaN or Inf")


def test_outputs_of_another_shape_are_a_fault_and_no_crash(flux: Path) -> None:
    with altered(lambda module: setattr(module.decoder, "conv_act", nn.AvgPool2d(2))):
        found = {row.call: row for row in vae_rows(flux)}
    assert found["vae.decode"].status == "failed"
    assert "instead of (1, 3," in found["vae.decode"].note


def test_a_component_that_no_call_reaches_does_not_pass(flux: Path) -> None:
    components = chosen(component_classes(flux), VAE)
    found = list(Checkpoint(flux, load_policy(), ALONE, CPU, fused=False).rows(components, [], "float32"))
    assert [(row.status, row.note) for row in found] == [("failed", "the pipeline made no call to it")]


def test_an_unknown_component_is_refused_with_those_that_there_are(flux: Path) -> None:
    with pytest.raises(StartFailed, match=r"no component 'unet' with weights; there are .*transformer"):
        chosen(component_classes(flux), ["unet"])


@pytest.mark.parametrize("staged", [True, False])
def test_staged_the_runtime_is_gone_before_the_reference_comes_and_afterwards_both_are(
    staged: bool, flux: Path
) -> None:
    ours: list[weakref.ref[nn.Module]] = []
    theirs: list[weakref.ref[nn.Module]] = []
    seen: list[bool] = []
    load_plain = compare.plain

    def watched(component: Component, dtype: torch.dtype, device: torch.device) -> nn.Module:
        seen.append(ours[0]() is None)
        module = load_plain(component, dtype, device)
        theirs.append(weakref.ref(module))
        return module

    with altered(lambda module: ours.append(weakref.ref(module))), patch.object(compare, "plain", watched):
        found = vae_rows(flux, staged)
    assert seen == [staged]
    assert {row.staged for row in found} == {staged}
    assert [one() for one in (*ours, *theirs)] == [None, None]


@pytest.mark.parametrize(("free", "staged"), [(1e3, True), (1e12, False)])
def test_stages_are_chosen_by_the_free_memory(free: float, staged: bool, flux: Path) -> None:
    with patch.object(verification.memory, "free_bytes", lambda _: free):
        assert {row.staged for row in vae_rows(flux)} == {staged}


def test_a_case_leaves_the_random_state_as_it_was(flux: Path) -> None:
    before = torch.random.get_rng_state()
    vae_rows(flux)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_compared_is_what_a_replica_serves(dtype: str, flux: Path) -> None:
    served = load_model(Config(model=str(flux), dtype=dtype, device="cpu")).pipeline  # type: ignore[arg-type]
    for name, cls in component_classes(flux).items():
        alone = plain(Component(flux, name, cls), getattr(torch, dtype), CPU).state_dict()
        there = served.components[name].state_dict()
        assert alone.keys() == there.keys()
        assert all(torch.equal(alone[key], there[key]) and alone[key].dtype is there[key].dtype for key in alone)


def test_recorded_calls_come_back_from_their_files(flux: Path, tmp_path: Path) -> None:
    given = Recorded("vae", "decode", (torch.arange(3.0), [None, (1, "a")]), {"scale": {"x": 0.5}, "flag": True})
    write([given], tmp_path / "calls")
    (found,) = read(tmp_path / "calls")
    assert torch.equal(found.args[0], given.args[0])
    assert (found.args[1], found.kwargs, found.name) == ([None, (1, "a")], given.kwargs, "vae.decode")


def test_an_argument_that_no_file_holds_is_refused_by_its_kind(tmp_path: Path) -> None:
    with pytest.raises(CannotKeep, match="a set"):
        write([Recorded("vae", "decode", ({1},), {})], tmp_path / "calls")


def test_the_same_request_is_recorded_twice_alike(flux: Path) -> None:
    first = recorded(flux, "float32")
    again = verification.record(load_model(Config(model=str(flux), dtype="float32", device="cpu")))
    assert [call.name for call in first] == [call.name for call in again]
    for one, other in zip(first, again, strict=True):
        tensors = zip(_tensors(one), _tensors(other), strict=True)
        assert all(torch.equal(a, b) for a, b in tensors)


def _tensors(call: Recorded) -> list[torch.Tensor]:
    leaves = torch.utils._pytree.tree_leaves((call.args, call.kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
