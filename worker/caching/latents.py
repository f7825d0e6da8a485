"""The latents of a denoiser's call: its first parameter, a tensor or a list of tensors with one element per row."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..crossing.call import Call
from ..pipelines.components import DENOISERS


def is_of_whole_denoiser(call: Call) -> bool:
    """True for calls to a denoiser itself; False for its parts and its other methods."""
    return call.method == "__call__" and call.component in DENOISERS


def latents(call: Call) -> list[torch.Tensor]:
    """The tensors of the call's first parameter; an empty list if it has another form."""
    value = call.args[0] if call.args else call.kwargs.get(_first_parameter(_forward(call.function)))
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, list) and all(isinstance(element, torch.Tensor) for element in value):
        return value
    return []


def is_same(tensor: torch.Tensor, other: torch.Tensor, version: int) -> bool:
    """True if ``tensor`` is ``other``, which nobody has written to since it had ``version``."""
    return tensor is other and tensor._version == version


def _forward(function: Callable[..., Any]) -> Callable[..., Any]:
    return type(function).forward if isinstance(function, nn.Module) else function


@functools.cache
def _first_parameter(forward: Callable[..., Any]) -> str:
    names = [name for name in inspect.signature(forward).parameters if name != "self"]
    return names[0] if names else ""
