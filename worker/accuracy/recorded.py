"""Calls to components, kept with their arguments: in memory, and as files that every rank reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils import _pytree as pytree

from ..crossing.call import Call

_TENSORS, _CALLS = "calls.safetensors", "calls.json"


class CannotKeep(Exception):
    """An argument of a kind that no file here can hold."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """A call that a pipeline made: of ``component`` (dotted below the pipeline), its ``method``; tensors on the CPU."""

    component: str
    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def owner(self) -> str:
        """The pipeline's own component that the call belongs to."""
        return self.component.partition(".")[0]

    @property
    def path(self) -> str:
        """Where the called module is below its owner; empty for the owner itself."""
        return self.component.partition(".")[2]

    @property
    def name(self) -> str:
        return self.component if self.method == "__call__" else f"{self.component}.{self.method}"


def keep(call: Call) -> Recorded:
    """``call`` with tensors copied, since the pipeline may go on to write to its own.

    Generators are left out: whoever draws from one would not draw the same twice. Numbers of which there is one for
    each row (timesteps, guidance) become powers of two: some models multiply them by 1000 in their own precision, and
    in bf16 the rounding of that product would drown every other error.
    """

    def kept(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            copy = leaf.detach().cpu().clone(memory_format=torch.contiguous_format)
            return _power_of_two(copy) if copy.ndim <= 1 and copy.is_floating_point() else copy
        return None if isinstance(leaf, torch.Generator) else leaf

    args, kwargs = pytree.tree_map(kept, (call.args, call.kwargs))
    return Recorded(call.component, call.method, args, kwargs)


def _power_of_two(numbers: torch.Tensor) -> torch.Tensor:
    """The nearest ones in logarithm; zero stays."""
    return torch.where(numbers == 0, numbers, numbers.sign() * numbers.abs().log2().round().exp2())


def write(calls: Sequence[Recorded], folder: Path) -> None:
    """Make ``folder`` with the calls in it. Raises ``CannotKeep`` where an argument is neither tensor nor JSON."""
    tensors: dict[str, torch.Tensor] = {}
    listed = [
        {
            "component": call.component,
            "method": call.method,
            "args": _encode(call.args, tensors),
            "kwargs": _encode(call.kwargs, tensors),
        }
        for call in calls
    ]
    folder.mkdir()
    save_file(tensors, folder / _TENSORS)
    (folder / _CALLS).write_text(json.dumps(listed))


def read(folder: Path) -> list[Recorded]:
    """What :func:`write` wrote."""
    tensors = load_file(folder / _TENSORS)
    listed = json.loads((folder / _CALLS).read_text())
    return [
        Recorded(call["component"], call["method"], _decode(call["args"], tensors), _decode(call["kwargs"], tensors))
        for call in listed
    ]


def _encode(value: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """JSON whose every value says its kind; tensors are added to ``tensors`` and named."""
    match value:
        case torch.Tensor():
            name = str(len(tensors))
            tensors[name] = value
            return {"tensor": name}
        case dict():
            return {"dict": {name: _encode(part, tensors) for name, part in value.items()}}
        case list():
            return {"list": [_encode(part, tensors) for part in value]}
        case tuple():
            return {"tuple": [_encode(part, tensors) for part in value]}
        case None | bool() | int() | float() | str():
            return {"plain": value}
    raise CannotKeep(f"an argument is a {type(value).__name__}")


def _decode(encoded: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Any:
    ((kind, value),) = encoded.items()
    match kind:
        case "tensor":
            return tensors[value]
        case "dict":
            return {name: _decode(part, tensors) for name, part in value.items()}
        case "list":
            return [_decode(part, tensors) for part in value]
        case "tuple":
            return tuple(_decode(part, tensors) for part in value)
    return value
