"""One component of a checkpoint as the runtime loads it, beside the same one as its own library loads it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import nn
from torch.utils import _pytree as pytree

from ..parallel.ranks import Ranks
from .measures import ShapesDiffer, distance
from .policy import Case, Policy
from .recorded import Recorded
from .report import Distance, Row
from .sides import Component, exact, plain, runtime

SEED = 0
"""Of the random numbers that a component draws in a call, the same for both sides."""

Outputs = dict[str, list[torch.Tensor]]
"""By the name of the call: every floating-point tensor that the calls of that name returned, in fp64 on the CPU."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What a comparison runs on. ``staged``: the runtime's component is gone before the reference is loaded."""

    dtype: torch.dtype
    device: torch.device
    ranks: Ranks
    fused: bool
    staged: bool


def compare(component: Component, calls: Sequence[Recorded], case: Case, policy: Policy, setting: Setting) -> list[Row]:
    """A row for each name among ``calls``, on rank 0; the other ranks, which all must call this too, return none."""
    held: list[nn.Module] = []
    dtype, device, ranks = setting.dtype, setting.device, setting.ranks
    sides = _Sides(calls, device, None if setting.staged else held)
    ours = sides.outputs(partial(runtime, component, dtype, device, ranks, fused=setting.fused))
    of_ranks = _of_all_ranks(ours, ranks, device)
    if ranks.rank != 0:
        return []
    theirs = sides.outputs(partial(plain, component, dtype, device))
    reference, computed_in = theirs, dtype
    if dtype is not torch.float32:
        computed_in = torch.float32 if policy.needs_fp32_reference(case) else torch.float64
        reference = sides.outputs(partial(exact, component, dtype, device, computed_in), computed_in)
    held.clear()
    _release(device)
    blank = Row(call="", component=component.name, cls=case.cls, dtype=case.dtype, status="passed")
    return [
        _row(
            msgspec.structs.replace(blank, call=name, staged=setting.staged),
            [outputs[name] for outputs in of_ranks],
            theirs[name] if reference is not theirs else None,
            reference[name],
            policy,
        )
        for name in reference
    ]


@dataclass(frozen=True, slots=True)
class _Sides:
    """Makes the calls on one side after the other. Modules are kept in ``held``, or let go where that is ``None``."""

    calls: Sequence[Recorded]
    device: torch.device
    held: list[nn.Module] | None

    def outputs(self, load: Callable[[], nn.Module], widened: torch.dtype | None = None) -> Outputs:
        """What the loaded module returns. Floating-point inputs are cast to ``widened``, if that is given."""
        module = load()
        found: Outputs = {}
        for call in self.calls:
            found.setdefault(call.name, []).extend(_run(module, call, self.device, widened))
        if self.held is not None:
            self.held.append(module)
        del module
        _release(self.device)
        return found


def _run(owner: nn.Module, call: Recorded, device: torch.device, widened: torch.dtype | None) -> list[torch.Tensor]:
    def place(tensor: torch.Tensor) -> torch.Tensor:
        moved = tensor.to(device, copy=True)  # a component may write to what it is given
        return moved.to(widened) if widened is not None and moved.is_floating_point() else moved

    args, kwargs = pytree.tree_map_only(torch.Tensor, place, (call.args, call.kwargs))
    function: Callable[..., Any] = getattr(owner.get_submodule(call.path), call.method)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(SEED)
        returned = function(*args, **kwargs)
    leaves = [_parameters(leaf) for leaf in pytree.tree_leaves(returned)]
    return [leaf.double().cpu() for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def _parameters(leaf: Any) -> Any:
    """Of a distribution, what it is drawn from: mean and logarithm of the variance."""
    return leaf.parameters if isinstance(leaf, DiagonalGaussianDistribution) else leaf


def _of_all_ranks(outputs: Outputs, ranks: Ranks, device: torch.device) -> list[Outputs]:
    """Every rank's outputs, on every rank."""
    gathered = {name: [ranks.gather(tensor.to(device)) for tensor in tensors] for name, tensors in outputs.items()}
    return [
        {name: [parts[rank].cpu() for parts in tensors] for name, tensors in gathered.items()}
        for rank in range(ranks.size)
    ]


def _row(
    blank: Row,
    of_ranks: list[list[torch.Tensor]],
    plain_outputs: list[torch.Tensor] | None,
    reference: list[torch.Tensor],
    policy: Policy,
) -> Row:
    if not reference:
        return msgspec.structs.replace(blank, status="failed", note="it returns no floating-point tensor")
    try:
        worst = max((distance(outputs, reference) for outputs in of_ranks), key=_farness)
    except ShapesDiffer as error:
        return msgspec.structs.replace(blank, status="failed", note=str(error))
    beside = None if plain_outputs is None else distance(plain_outputs, reference)
    fault = policy.fault(worst, beside)
    return msgspec.structs.replace(
        blank, status="failed" if fault else "passed", note=fault or "", runtime=worst, plain=beside
    )


def _farness(found: Distance) -> float:
    return found.relative_l2


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
