"""Recorded calls to components with their arguments, in memory and in files that every rank reads."""

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
    """An argument has a type that the files cannot hold."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """A pipeline's call of ``component.method``, with tensors on the CPU. ``component`` is the dotted name."""

    component: str
    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def owner(self) -> str:
        """The name of the pipeline's component that the call belongs to."""
        return self.component.partition(".")[0]

    @property
    def path(self) -> str:
        """The dotted name of the called module below its owner; empty for the owner itself."""
        return self.component.partition(".")[2]

    @property
    def name(self) -> str:
        return self.component if self.method == "__call__" else f"{self.component}.{self.method}"


def keep(call: Call) -> Recorded:
    """Record ``call`` with copies of its tensors, because the pipeline may write to the originals.

    Generators are left out, as they would yield other numbers the second time. Numbers with one value per row
    (timesteps, guidance) become powers of two: some models multiply them by 1000 in their own precision, and in bf16
    the rounding of that product would exceed all other errors.
    """

    def kept(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            copy = leaf.detach().cpu().clone(memory_format=torch.contiguous_format)
            return _power_of_two(copy) if copy.ndim <= 1 and copy.is_floating_point() else copy
        return None if isinstance(leaf, torch.Generator) else leaf

    args, kwargs = pytree.tree_map(kept, (call.args, call.kwargs))
    return Recorded(call.component, call.method, args, kwargs)


def _power_of_two(numbers: torch.Tensor) -> torch.Tensor:
    """The nearest powers of two by logarithm; zero stays zero."""
    return torch.where(numbers == 0, numbers, numbers.sign() * numbers.abs().log2().round().exp2())


def write(calls: Sequence[Recorded], folder: Path) -> None:
    """Write ``calls`` to the new ``folder``. Raises ``CannotKeep`` for an argument that is neither tensor nor JSON."""
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
    """Read the calls that :func:`write` wrote."""
    tensors = load_file(folder / _TENSORS)
    listed = json.loads((folder / _CALLS).read_text())
    return [
        Recorded(call["component"], call["method"], _decode(call["args"], tensors), _decode(call["kwargs"], tensors))
        for call in listed
    ]


def _encode(value: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Encode as JSON in which every value has its type; tensors are added to ``tensors`` and referenced by name."""
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
