"""Read a trainer's tensors: gathered from its ranks into this machine's memory, one at a time."""

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

Tensors may be on any device, and sharded over ranks (DTensors, FSDP).
"""


@dataclass(frozen=True, slots=True)
class TensorStream:
    """``tensors`` of ``nbytes`` in total, where that is known in advance.

    Advancing the iterator gathers a tensor, a collective of all ranks: ``take_part`` joins the collectives of all
    tensors that were not taken.
    """

    tensors: Iterator[HostTensor]
    nbytes: int | None
    take_part: Callable[[], None]


def read(named: NamedTensors) -> TensorStream:
    """Raises ``InvalidRequest`` for values that are not tensors and, while the stream is read, for a repeated name."""
    if isinstance(named, str | Path):
        stored = list(from_files(_files_of_one_module(Path(named))))
        return TensorStream(_each_once(stored), sum(tensor.nbytes for tensor in stored), lambda: None)
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

    return TensorStream(_each_once(_on_host(pairs)), nbytes, take_part)


def is_primary() -> bool:
    """Return true on the rank that sends: rank 0, or a process without a torch.distributed group."""
    return rank_and_size()[0] == 0


@contextmanager
def drained(stream: TensorStream) -> Iterator[Iterator[HostTensor]]:
    """Yield the tensors. After an error, gather the rest too: the other ranks wait in those collectives."""
    try:
        yield stream.tensors
    except Exception:
        if rank_and_size()[1] > 1:
            stream.take_part()
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
            raise InvalidRequest(f"The tensor {tensor.name} is given twice: names must be unique.")
        seen.add(tensor.name)
        yield tensor


def _on_host(pairs: Iterator[tuple[str, torch.Tensor]]) -> Iterator[HostTensor]:

    for name, tensor in pairs:
        _check(name, tensor)
        gathered = whole(tensor)
        assert gathered is not None, "rank 0 gets the gathered tensor"
        yield from_torch(name, gathered)


def _check(name: str, tensor: object) -> None:
    import torch

    if not isinstance(tensor, torch.Tensor):
        raise InvalidRequest(f"{name} is a {type(tensor).__name__}, not a tensor.")


def _state(module: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of ``module`` under checkpoint names; of several names for the same memory, only the first."""
    import torch

    if torch.distributed.is_available():
        from torch.distributed.checkpoint.state_dict import get_model_state_dict  # removes the prefixes of wrappers

        state = cast("dict[str, torch.Tensor]", get_model_state_dict(module))
    else:
        state = module.state_dict()
    first = {identity(tensor): name for name, tensor in reversed(state.items())}
    once = {name: tensor for name, tensor in state.items() if first[identity(tensor)] == name}
    return _as_saved(module, once)


def _as_saved(module: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename ``state`` as transformers saves it; diffusers saves the state dict's own names."""
    if (transformers := sys.modules.get("transformers")) is None:
        return state
    model = next((part for part in module.modules() if isinstance(part, transformers.PreTrainedModel)), None)
    if model is None:
        return state
    from transformers.core_model_loading import revert_weight_conversion

    saved: dict[str, torch.Tensor] = revert_weight_conversion(model, state)
    return saved
