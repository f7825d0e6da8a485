"""Admission of quantized components: their outputs beside those of the checkpoint's weights, at load.

The inputs are those of small requests, as in a verification. The reference is the component of its own library, which
computes with the checkpoint's weights in fp64, or in the widest precision for which there is memory.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial

import msgspec
import torch
from torch import nn

from ...protocol.errors import StartFailed
from ...protocol.replicas import Accuracy
from ..model.model import Model
from ..model.modules import modules
from ..parallel.ranks import Ranks
from ..parallel.starting import all_or_none
from . import memory
from .compare import Outputs, Sides
from .measures import distance
from .policy import Policy, load_policy
from .recorded import Recorded
from .recorder import record
from .sides import Component, exact, plain

log = logging.getLogger(__name__)


def admit(model: Model, ranks: Ranks, variant: str | None) -> dict[str, Accuracy]:
    """The accuracy of each quantized component. All ranks must call this together.

    Raises ``StartFailed``, with the figures, for one that is not accurate enough.
    """
    measured = all_or_none(ranks, lambda: _measured(model, variant, is_primary=ranks.rank == 0))
    of_ranks = ranks.all_gather_bytes(msgspec.msgpack.encode(measured))
    accuracy = msgspec.msgpack.decode(of_ranks[0], type=dict[str, Accuracy])
    model.rest()
    judge(accuracy, {name: one.scheme for name, one in model.quantized.items()}, load_policy())
    return accuracy


def _measured(model: Model, variant: str | None, *, is_primary: bool) -> dict[str, Accuracy]:
    """The first rank measures; the others compute their parts of the outputs."""
    calls = record(model)
    found: dict[str, Accuracy] = {}
    for name in model.quantized:
        own = [call for call in calls if call.owner == name]
        module = modules(model.pipeline)[name]
        with nullcontext() if model.offload is None else model.offload.present(name):
            ours = Sides(own, model.device, held=None).outputs(partial(_itself, module))
        if is_primary:
            component = Component(model.directory, name, type(module), variant)
            found[name] = _accuracy(ours, own, component, model.dtype, model.device)
    return found


def _itself(module: nn.Module) -> nn.Module:
    return module


def judge(accuracy: Mapping[str, Accuracy], schemes: Mapping[str, str], policy: Policy) -> None:
    """Raise ``StartFailed`` for a component that is not accurate enough."""
    for name, one in accuracy.items():
        figures = (
            f"the relative L2 distance of its outputs from {one.reference} is {one.relative_l2:.2g}, and the plain "
            f"component's is {one.plain:.2g}"
        )
        most = policy.quantized.relative_l2
        if not one.relative_l2 <= most:  # NaN is not
            raise StartFailed(
                f"--quantize: {name} is not accurate enough in {schemes[name]}: {figures}; {most:g} is allowed. "
                f"Leave {name} out, or take another scheme."
            )
        log.info("%s is accurate enough in %s: %s", name, schemes[name], figures)


def _accuracy(
    ours: Outputs, calls: Sequence[Recorded], component: Component, dtype: torch.dtype, device: torch.device
) -> Accuracy:
    if not ours:
        raise StartFailed(f"--quantize: no small request calls {component.name}, so its accuracy is not known.")
    wide, place = _reference(component, dtype, device)
    sides = Sides(calls, place, held=None)
    reference = sides.outputs(partial(exact, component, dtype, place, wide), wide)
    beside = reference if wide == dtype else sides.outputs(partial(plain, component, dtype, place))
    return Accuracy(_farthest(ours, reference), _farthest(beside, reference), str(wide).removeprefix("torch."))


def _farthest(outputs: Outputs, reference: Outputs) -> float:
    """The largest relative L2 distance of any output."""
    pairs = ((one, wanted) for name in reference for one, wanted in zip(outputs[name], reference[name], strict=True))
    return max(distance(one, wanted).relative_l2 for one, wanted in pairs)


def _reference(component: Component, dtype: torch.dtype, device: torch.device) -> tuple[torch.dtype, torch.device]:
    """The widest precision in which the component fits, and the device on which it does."""
    places = dict.fromkeys((device, torch.device("cpu")))
    for wide in (torch.float64, torch.float32):
        needed = memory.numbers(component.folder) * (dtype.itemsize + wide.itemsize)
        for place in places:
            if memory.fits(needed, place):
                return wide, place
    return dtype, torch.device("cpu")
