"""One component of a checkpoint as the runtime loads it, beside the same one as its own library loads it.

Each side reads the checkpoint for itself, so that a mistake of the loader shows. The runtime's comes first, and is gone
before the reference is loaded: no more than one of them is in memory.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import nn
from torch.utils import _pytree as pytree

from ..models import family_of
from ..parallel.ranks import Ranks
from ..weights.loader import load_component
from .measures import Distance, distance, fault
from .record import Recorded


@dataclass(frozen=True, slots=True)
class Row:
    """One call's result. ``plain`` is the distance of the plain component in the same low precision, if it is one."""

    name: str
    cls: str
    runtime: Distance
    plain: Distance | None

    @property
    def fault(self) -> str | None:
        return fault(self.runtime, self.plain)


def compare(
    cls: type[nn.Module],
    folder: Path,
    calls: Sequence[Recorded],
    *,
    dtype: torch.dtype,
    device: torch.device,
    ranks: Ranks,
    fused: bool,
) -> list[Row]:
    """A row for each of ``calls``. Every rank must call this; the rows are the same on all."""
    family = family_of(cls)
    own = load_component(cls, folder, dtype=dtype, device=device, family=family, ranks=ranks, fused=fused).module
    outputs = [_run(own, call, dtype, device) for call in calls]
    del own
    gc.collect()
    if dtype is torch.float32:
        references = _reference(cls, folder, calls, dtype, dtype, device)
        return [
            Row(call.name, cls.__name__, distance(output, wanted), None)
            for call, output, wanted in zip(calls, outputs, references, strict=True)
        ]
    plains = _reference(cls, folder, calls, dtype, dtype, device)
    exact = _reference(cls, folder, calls, dtype, torch.float64, device)
    return [
        Row(call.name, cls.__name__, distance(output, wanted), distance(plain, wanted))
        for call, output, plain, wanted in zip(calls, outputs, plains, exact, strict=True)
    ]


def _reference(
    cls: Any,
    folder: Path,
    calls: Sequence[Recorded],
    dtype: torch.dtype,
    computed_in: torch.dtype,
    device: torch.device,
) -> list[torch.Tensor]:
    """What the library's own component gives, with weights and inputs of ``dtype``, computed in ``computed_in``."""
    module = cls.from_pretrained(folder, dtype=dtype, use_safetensors=True).to(device)
    if computed_in is not dtype:
        module = module.to(computed_in)
    return [_run(module, call, dtype, device, computed_in) for call in calls]


def _run(
    module: nn.Module,
    call: Recorded,
    dtype: torch.dtype,
    device: torch.device,
    computed_in: torch.dtype | None = None,
) -> torch.Tensor:
    """The call's output as one vector on the CPU: every floating-point tensor in it, end to end."""

    def place(tensor: torch.Tensor) -> torch.Tensor:
        moved = tensor.to(device)
        return moved.to(dtype).to(computed_in or dtype) if moved.is_floating_point() else moved

    args, kwargs = pytree.tree_map_only(torch.Tensor, place, (call.args, call.kwargs))
    function = module if call.method == "__call__" else getattr(module, call.method)
    leaves = [
        leaf.parameters if isinstance(leaf, DiagonalGaussianDistribution) else leaf
        for leaf in pytree.tree_leaves(function(*args, **kwargs))
    ]
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
    return torch.cat([tensor.detach().flatten().double().cpu() for tensor in tensors])
