"""What a trainer hands over, as whole tensors in this machine's memory, one at a time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast

from ..protocol.errors import InvalidRequest
from .gathering import identity, rank_and_size, whole
from .host_tensors import HostTensor, from_files, from_torch
from .module_files import files_of, module_paths

if TYPE_CHECKING:
    import torch
    from torch import nn

NamedTensors: TypeAlias = "nn.Module | Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]] | str | Path"
"""A module, tensors by their checkpoint names, or the path of one module's safetensors files.

Tensors may be on any device, and divided among ranks: DTensors, and what FSDP makes of a module.
"""


@dataclass(frozen=True, slots=True)
class Given:
    """``tensors``, of ``nbytes`` in all where that is known before the last of them.

    To take a tensor is to gather it, which all ranks do together: ``take_part`` does so for what was not taken.
    """

    tensors: Iterator[HostTensor]
    nbytes: int | None
    take_part: Callable[[], None]


def read(named: NamedTensors) -> Given:
    """Raises ``InvalidRequest`` for what has no tensors; while they are taken, for a name that comes twice."""
    if isinstance(named, str | Path):
        stored = list(from_files(_files_of_one_module(Path(named))))
        return Given(_each_once(stored), sum(tensor.nbytes for tensor in stored), lambda: None)
    from torch import nn

    if isinstance(named, nn.Module):
        named = _state(named)
    nbytes = None
    if isinstance(named, Mapping):
        for name, tensor in named.items():
            _check(name, tensor)
        nbytes = sum(prod(tensor.shape) * tensor.dtype.itemsize for tensor in named.values())
        named = named.items()
    pairs = iter(named)

    def take_part() -> None:
        for _, tensor in pairs:
            whole(tensor)

    return Given(_each_once(_on_host(pairs)), nbytes, take_part)


def leads() -> bool:
    """Whether this process is the one that sends: rank 0 of its torch.distributed group, or in none."""
    return rank_and_size()[0] == 0


@contextmanager
def to_the_end(given: Given) -> Iterator[Iterator[HostTensor]]:
    """Its tensors. After an error the rest is gathered all the same, for the other ranks wait until it is."""
    try:
        yield given.tensors
    except Exception:
        if rank_and_size()[1] > 1:
            given.take_part()
        raise


def _files_of_one_module(path: Path) -> list[Path]:
    paths = module_paths(path)
    if len(paths) != 1:
        raise InvalidRequest(f"{path} has the weights of {', '.join(paths)}: give the directory of one of them.")
    return files_of(next(iter(paths.values())))


def _each_once(tensors: Iterable[HostTensor]) -> Iterator[HostTensor]:
    seen: set[str] = set()
    for tensor in tensors:
        if tensor.name in seen:
            raise InvalidRequest(f"The tensor {tensor.name} is given twice.")
        seen.add(tensor.name)
        yield tensor


def _on_host(pairs: Iterator[tuple[str, torch.Tensor]]) -> Iterator[HostTensor]:

    for name, tensor in pairs:
        _check(name, tensor)
        gathered = whole(tensor)
        assert gathered is not None, "rank 0 gets what is gathered"
        yield from_torch(name, gathered)


def _check(name: str, tensor: object) -> None:
    import torch

    if not isinstance(tensor, torch.Tensor):
        raise InvalidRequest(f"{name} is no tensor but {type(tensor).__name__}.")


def _state(module: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of ``module`` by the names that its checkpoint has; of names for the same memory, the first."""
    import torch

    if torch.distributed.is_available():
        from torch.distributed.checkpoint.state_dict import get_model_state_dict  # sees through what wraps a module

        state = cast("dict[str, torch.Tensor]", get_model_state_dict(module))
    else:
        state = module.state_dict()
    first = {identity(tensor): name for name, tensor in reversed(state.items())}
    once = {name: tensor for name, tensor in state.items() if first[identity(tensor)] == name}
    return _as_saved(module, once)


def _as_saved(module: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``state`` under the names that transformers saves it by; diffusers' names are the state dict's own."""
    if (transformers := sys.modules.get("transformers")) is None:
        return state
    model = next((part for part in module.modules() if isinstance(part, transformers.PreTrainedModel)), None)
    if model is None:
        return state
    from transformers.core_model_loading import revert_weight_conversion

    saved: dict[str, torch.Tensor] = revert_weight_conversion(model, state)
    return saved
