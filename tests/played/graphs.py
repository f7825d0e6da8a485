"""CUDA graphs that are played: a tape of operators over memory that stays where it is, on any device.

As in a CUDA graph, a replay runs the recorded operators and no Python: it reads the memory that they read when they
were captured, and writes the memory that they wrote. It does not see what has moved since. A capture computes nothing
that can be read, and refuses operators for which the host must wait.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .record import RECORD

_WAITING = frozenset(
    {
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.nonzero.default,
        torch.ops.aten.equal.default,
        torch.ops.aten.masked_select.default,
    }
)

Step = tuple[Any, tuple[Any, ...], dict[str, Any], Any]
"""An operator, its arguments, and its result, as tensors of the same memory."""


class Tape(TorchDispatchMode):
    """Notes every operator."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[Step] = []

    @property
    def nbytes(self) -> int:
        return sum(one.nbytes for step in self.steps for one in _made(step))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _WAITING or (func is torch.ops.aten.index.Tensor and _has_mask(args[1])):
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({func})")
        kept = _aliased(args), _aliased(kwargs or {})
        result = func(*args, **(kwargs or {}))
        self.steps.append((func, *kept, _aliased(result)))
        return result

    def spoil(self) -> None:
        """Overwrite what was computed."""
        for step in self.steps:
            for tensor in _made(step):
                tensor.fill_(float("nan") if tensor.is_floating_point() else 1)

    def replay(self) -> None:
        for func, args, kwargs, result in self.steps:
            again = func(*args, **kwargs)
            for there, now in zip(pytree.tree_leaves(result), pytree.tree_leaves(again), strict=True):
                if isinstance(there, torch.Tensor) and there.data_ptr() != now.data_ptr():
                    there.copy_(now)


class PlayedGraph:
    """``torch.cuda.CUDAGraph``."""

    def __init__(self) -> None:
        self._tape = Tape()

    @property
    def nbytes(self) -> int:
        return self._tape.nbytes

    def capture_begin(self, pool: object = None, capture_error_mode: str = "global") -> None:
        assert not RECORD.captures, "one capture at a time"
        RECORD.captures = True
        self._tape.__enter__()

    def capture_end(self) -> None:
        self._tape.__exit__(None, None, None)
        RECORD.captures = False
        self._tape.spoil()

    def replay(self) -> None:
        assert not RECORD.captures, "a graph is not replayed in a capture"
        RECORD.operators["graph replay"] += 1
        self._tape.replay()


def _aliased(value: Any) -> Any:
    """``value`` with tensors of the same memory, which stays theirs when others are put into the originals' place."""
    return pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, value)


def _made(step: Step) -> Iterator[torch.Tensor]:
    """The tensors whose memory the operator allocated."""
    _, args, kwargs, result = step
    given = {_storage(one) for one in pytree.tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)}
    for tensor in pytree.tree_leaves(result):
        if isinstance(tensor, torch.Tensor) and tensor.numel() and _storage(tensor) not in given:
            yield tensor


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _has_mask(indices: Sequence[torch.Tensor | None]) -> bool:
    return any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in indices)
