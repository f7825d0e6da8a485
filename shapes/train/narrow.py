"""Mixed precision: bfloat16 where that is faster, float32 where CPUs are faster with it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


@contextlib.contextmanager
def narrow(device: torch.device) -> Iterator[None]:
    """A bfloat16 autocast; on a CPU attention stays in float32."""
    attention = WideAttention() if device.type == "cpu" else contextlib.nullcontext()
    with torch.autocast(device.type, torch.bfloat16), attention:
        yield


class WideAttention(TorchFunctionMode):
    """Attention in float32 inside a bfloat16 autocast: on CPUs its backward pass is four times faster so."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            return func(*(_wide(part) for part in args), **{name: _wide(part) for name, part in kwargs.items()})


def _wide(argument: Any) -> Any:
    """A bfloat16 tensor as float32; anything else, a mask of booleans for one, as it is."""
    narrow = isinstance(argument, Tensor) and argument.dtype == torch.bfloat16
    return argument.float() if narrow else argument
