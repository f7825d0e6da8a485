"""Realistic inputs for every component: what a pipeline itself gives them, taken at the boundary.

One small request is run on plain, unchanged components. The first call of each kind is kept, so that no component needs
inputs written for it, and a new pipeline has them on the day it is released.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch.utils import _pytree as pytree

from ..call import Call
from ..fork import fork

PROMPT = "two small blue squares and a star on a white table"
SEED = 0


@dataclass(frozen=True, slots=True)
class Recorded:
    """A call that a pipeline made: of ``component``, its ``method`` with these arguments, on the CPU."""

    component: str
    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        return self.component if self.method == "__call__" else f"{self.component}.{self.method}"


def record(pipeline: DiffusionPipeline, arguments: dict[str, Any]) -> list[Recorded]:
    """The first call of each kind in one request, in the order of the calls; sub-modules' calls are their owner's."""
    seen: dict[str, Recorded] = {}

    def crossing(call: Call) -> Any:
        if "." not in call.component and call.name not in seen:
            seen[call.name] = Recorded(call.component, call.method, *_kept((call.args, call.kwargs)))
        return call.run()

    generator = torch.Generator("cpu").manual_seed(SEED)
    fork(pipeline, crossing)(prompt=PROMPT, generator=generator, **arguments)
    return list(seen.values())


def _kept(values: Any) -> Any:
    """The values with tensors copied to the CPU: the pipeline may go on to write to its own."""
    return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), values)
