"""Predictions of the further calls of a denoising step, from the step's first call and from the step before.

Guidance calls the denoiser again with the same latents and timestep and with another prompt. Whatever the second call
shares with the first one is taken from the first call, and everything else from the last step's second call.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..crossing.call import Call
from ..crossing.thread_state import ThreadState, thread_state
from ..forward.signature import Signatures
from .late_check import LateCheck
from .latents import is_same

_SMALL = 4096
"""Elements up to which tensors are compared by value: timesteps, of a sample or of each token."""


class Origin(enum.Enum):
    """Where a predicted argument comes from."""

    FIRST = enum.auto()
    """The first call has the same object, or an equal plain value."""
    COMPUTED = enum.auto()
    """The first call has a tensor of the same value: the pipeline computes it for each call (a timestep)."""
    LAST = enum.auto()
    """The last step's call has the same object, or an equal plain value."""


@dataclass(frozen=True, slots=True)
class Follower:
    """The form of a call that follows the first one in every step; ``leaves`` are the last step's."""

    spec: pytree.TreeSpec
    leaves: tuple[Any, ...]
    origins: tuple[Origin, ...]


@dataclass(frozen=True, slots=True)
class Prediction:
    """A ``call`` that the pipeline is expected to make, with the versions of its tensors when it was predicted."""

    call: Call
    spec: pytree.TreeSpec
    leaves: tuple[Any, ...]
    versions: tuple[int, ...]
    origins: tuple[Origin, ...]
    state: ThreadState

    def matches(self, call: Call, late: LateCheck) -> bool:
        """True if ``call`` is the predicted one. ``late`` compares what a GPU has not computed yet."""
        leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
        if spec != self.spec or thread_state() != self.state:
            return False
        unsure: list[tuple[torch.Tensor, torch.Tensor]] = []
        for leaf, expected, version, origin in zip(leaves, self.leaves, self.versions, self.origins, strict=True):
            if not isinstance(leaf, torch.Tensor):
                if not _are_equal(leaf, expected):
                    return False
            elif origin is not Origin.COMPUTED:
                if not is_same(leaf, expected, version):
                    return False
            elif not _are_comparable(leaf, expected):
                return False
            elif leaf.device.type == "cpu":
                if not torch.equal(leaf, expected):
                    return False
            else:
                unsure.append((leaf, expected))
        if unsure:
            late.expect_equal(unsure)
        return True


def learn(first: Call, call: Call, signatures: Signatures) -> Follower | None:
    """The form of ``call``, which followed ``first`` in a step; ``None`` if the two cannot be one forward.

    That is so if their signatures differ, or if they have arguments that may keep state. May wait for the device.
    """
    own, other = signatures.read(call), signatures.read(first)
    if own is None or other is None or own.signature != other.signature:
        return None
    leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
    firsts = pytree.tree_leaves((first.args, first.kwargs))
    if not all(_is_plain(leaf) for leaf in leaves):
        return None
    origins = tuple(_origin(leaf, other) for leaf, other in zip(leaves, firsts, strict=True))
    return Follower(spec, tuple(leaves), origins)


def predict(first: Call, follower: Follower) -> Prediction | None:
    """The call that will follow ``first``; ``None`` if ``first`` has not the form of the last step's first call."""
    firsts, spec = pytree.tree_flatten((first.args, first.kwargs))
    if spec != follower.spec or not all(_is_plain(leaf) for leaf in firsts):
        return None
    columns = zip(firsts, follower.leaves, follower.origins, strict=True)
    leaves = tuple(last if origin is Origin.LAST else own for own, last, origin in columns)
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    call = Call(first.component, first.method, first.function, args, kwargs, first.changes)
    versions = tuple(leaf._version if isinstance(leaf, torch.Tensor) else 0 for leaf in leaves)
    return Prediction(call, spec, leaves, versions, follower.origins, thread_state())


def _origin(leaf: Any, first: Any) -> Origin:
    if not isinstance(leaf, torch.Tensor):
        return Origin.FIRST if _are_equal(leaf, first) else Origin.LAST
    if leaf is first:
        return Origin.FIRST
    if isinstance(first, torch.Tensor) and _are_comparable(leaf, first) and torch.equal(leaf, first):
        return Origin.COMPUTED
    return Origin.LAST


def _is_plain(leaf: Any) -> bool:
    """True for values, and for tensors whose writes are counted. An object may keep what the last call left in it."""
    if isinstance(leaf, torch.Tensor):
        return not leaf.is_inference()
    return isinstance(leaf, str | int | float | bool | torch.dtype | torch.device | None)


def _are_equal(leaf: Any, other: Any) -> bool:
    return type(leaf) is type(other) and bool(leaf == other)


def _are_comparable(leaf: torch.Tensor, other: torch.Tensor) -> bool:
    alike = leaf.shape == other.shape and leaf.dtype == other.dtype and leaf.device == other.device
    return alike and leaf.numel() <= _SMALL
