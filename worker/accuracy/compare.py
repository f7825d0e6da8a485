"""Compares a component as the runtime loads it with the same component as its library loads it."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import msgspec
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import nn
from torch.utils import _pytree as pytree

from ..parallel.ranks import Ranks
from .measures import distance
from .policy import Case, Policy
from .recorded import Recorded
from .report import Distance, ReportRow
from .sides import Component, exact, plain, runtime

SEED = 0
"""The seed of the random numbers that a component draws in a call, on both sides."""

Output = list[torch.Tensor]
"""One floating-point tensor of a call's result, for each call of the same name, in fp64 on the CPU."""

Outputs = dict[str, list[Output]]
"""The outputs by name of the call."""


@dataclass(frozen=True, slots=True)
class ComparisonSetting:
    """The setting of a comparison. ``staged``: the runtime's component is freed before the reference is loaded."""

    dtype: torch.dtype
    device: torch.device
    ranks: Ranks
    fused: bool
    staged: bool


def compare(
    component: Component, calls: Sequence[Recorded], case: Case, policy: Policy, setting: ComparisonSetting
) -> list[ReportRow]:
    """One row per name among ``calls``, on rank 0. Every rank must call this; the others return an empty list."""
    held: list[nn.Module] = []
    dtype, device, ranks = setting.dtype, setting.device, setting.ranks
    sides = Sides(calls, device, None if setting.staged else held)
    ours = sides.outputs(partial(runtime, component, dtype, device, ranks, fused=setting.fused))
    of_ranks = _of_all_ranks(ours, ranks, device)
    if ranks.rank != 0:
        return []
    theirs, reference = references(component, sides, setting)
    held.clear()
    _release(device)
    blank = ReportRow(call="", component=component.name, cls=case.cls, dtype=case.dtype, status="passed")
    return [
        _row(
            msgspec.structs.replace(blank, call=name, staged=setting.staged),
            [outputs[name] for outputs in of_ranks],
            None if theirs is None else theirs[name],
            reference[name],
            policy,
        )
        for name in reference
    ]


def references(component: Component, sides: Sides, setting: ComparisonSetting) -> tuple[Outputs | None, Outputs]:
    """The library component's outputs in a low precision (``None`` for fp32), and its reference in fp32 or fp64."""
    theirs = sides.outputs(partial(plain, component, setting.dtype, setting.device))
    if setting.dtype is torch.float32:
        return None, theirs
    return theirs, sides.outputs(partial(exact, component, setting.dtype, setting.device), torch.float64)


@dataclass(frozen=True, slots=True)
class Sides:
    """Runs the calls on one side after the other. Modules stay referenced in ``held``, unless it is ``None``."""

    calls: Sequence[Recorded]
    device: torch.device
    held: list[nn.Module] | None

    def outputs(self, load: Callable[[], nn.Module], widened: torch.dtype | None = None) -> Outputs:
        """The loaded module's outputs. Floating-point inputs are cast to ``widened``, if given."""
        module = load()
        found: Outputs = {}
        for call in self.calls:
            outputs = found.setdefault(call.name, [])
            for index, tensor in enumerate(_run(module, call, self.device, widened)):
                if index == len(outputs):
                    outputs.append([])
                outputs[index].append(tensor)
        if self.held is not None:
            self.held.append(module)
        del module
        _release(self.device)
        return found


def _run(owner: nn.Module, call: Recorded, device: torch.device, widened: torch.dtype | None) -> list[torch.Tensor]:
    def place(tensor: torch.Tensor) -> torch.Tensor:
        moved = tensor.to(device, copy=True)  # a component may write to its inputs
        return moved.to(widened) if widened is not None and moved.is_floating_point() else moved

    args, kwargs = pytree.tree_map_only(torch.Tensor, place, (call.args, call.kwargs))
    function: Callable[..., Any] = getattr(owner.get_submodule(call.path), call.method)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(SEED)
        returned = function(*args, **kwargs)
    leaves = [_parameters(leaf) for leaf in pytree.tree_leaves(returned)]
    return [leaf.double().cpu() for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def _parameters(leaf: Any) -> Any:
    """A distribution's parameters (mean and log-variance), or ``leaf`` itself."""
    return leaf.parameters if isinstance(leaf, DiagonalGaussianDistribution) else leaf


def _of_all_ranks(outputs: Outputs, ranks: Ranks, device: torch.device) -> list[Outputs]:
    """The outputs of every rank, on every rank; an empty list if their shapes differ."""
    leaves, spec = pytree.tree_flatten(outputs)
    form = f"{[tuple(leaf.shape) for leaf in leaves]} {spec}"
    digest = torch.tensor(list(hashlib.sha256(form.encode()).digest()), dtype=torch.uint8, device=device)
    if not all(torch.equal(digest, other) for other in ranks.all_gather(digest)):
        return []
    gathered = [ranks.all_gather(leaf.to(device)) for leaf in leaves]
    return [pytree.tree_unflatten([parts[rank].cpu() for parts in gathered], spec) for rank in range(ranks.size)]


def _row(
    blank: ReportRow,
    of_ranks: Sequence[Sequence[Output]],
    plain_outputs: Sequence[Output] | None,
    reference: Sequence[Output],
    policy: Policy,
) -> ReportRow:
    """``blank`` with the worst distance of any output of any rank."""
    if (fault := _not_comparable(of_ranks, reference)) is not None:
        return msgspec.structs.replace(blank, status="failed", note=fault)
    found: list[tuple[str, Distance, Distance | None]] = []
    for index, wanted in enumerate(reference):
        beside = None if plain_outputs is None else distance(plain_outputs[index], wanted)
        for outputs in of_ranks:
            one = distance(outputs[index], wanted)
            found.append((policy.fault(one, beside) or "", one, beside))
    fault, worst, beside = max(found, key=lambda one: (one[0] != "", one[1].relative_l2))
    status: Literal["failed", "passed"] = "failed" if fault else "passed"
    return msgspec.structs.replace(blank, status=status, note=fault, runtime=worst, plain=beside)


def _not_comparable(of_ranks: Sequence[Sequence[Output]], reference: Sequence[Output]) -> str | None:
    """The reason why the outputs cannot be compared with the reference; ``None`` if they can."""
    if not of_ranks:
        return "the ranks return outputs of different shapes"
    if not reference:
        return "it returns no floating-point tensor"
    tensors, wanted = pytree.tree_leaves(of_ranks[0]), pytree.tree_leaves(reference)
    if len(tensors) != len(wanted):
        return f"{len(tensors)} tensors instead of {len(wanted)}"
    if not all(tensor.isfinite().all() for tensor in wanted):
        return "the reference has NaN or Inf"
    pairs = ((tuple(one.shape), tuple(other.shape)) for one, other in zip(tensors, wanted, strict=True))
    return next((f"an output of shape {one} instead of {other}" for one, other in pairs if one != other), None)


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
