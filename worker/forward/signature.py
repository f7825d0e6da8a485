"""The batch signature of a call: two calls may merge into one forward if theirs are equal.

Every leaf of a call's arguments either has a row per sample or is shared by all rows.

The *primary* argument is the first one that is a tensor with dimensions or a list of tensors; its first dimension (or
its length) is the number of rows. Every other leaf then has one of four roles:

========  ====================================================  ==============================
role      leaf                                                  in a merged call
========  ====================================================  ==============================
batched   a tensor whose first dimension is the rows            concatenated along it
scalar    a tensor without dimensions (a timestep)              expanded to the rows, then concatenated
listed    a list with one element per row                       extended
shared    anything else (position ids, flags)                   equal in all calls, passed once
========  ====================================================  ==============================
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from ..crossing.call import Call
from ..pipelines.components import DENOISERS, MERGEABLE_METHODS
from .structure import Structure, flatten


class Role(enum.Enum):
    BATCHED = enum.auto()
    SCALAR = enum.auto()
    LISTED = enum.auto()
    SHARED = enum.auto()


@dataclass(slots=True, eq=False)
class Batchable:
    """A call's flattened arguments. Calls with equal ``signature`` can merge.

    ``positions`` measures the work: rows times tokens, or rows times latent pixels, of the primary argument.
    ``row_shape`` is the shape of its rows, if it is a tensor that has more than the row dimension. ``marks`` are the
    leaves' parts of the signature.
    """

    leaves: list[Any]
    structure: Structure
    roles: list[Role]
    rows: int
    positions: int
    listed: bool
    row_shape: tuple[int, ...] | None
    name: str
    marks: tuple[Hashable, ...]
    signature: Hashable

    @property
    def form(self) -> Hashable:
        """Calls with equal forms differ only in their tensors, so their outputs have the same structure."""
        columns = zip(self.leaves, self.marks, strict=True)
        plain = tuple(mark for leaf, mark in columns if not isinstance(leaf, torch.Tensor))
        return (self.name, self.structure, plain)


class Signatures:
    """Reads calls' signatures; caches the digests of shared tensors."""

    def __init__(self) -> None:
        self._digests: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def read(self, call: Call) -> Batchable | None:
        """Flatten ``call``; ``None`` if it has no rows to batch by or is part of an autograd graph."""
        primary = _primary(call)
        if primary is None or call.method not in MERGEABLE_METHODS:
            return None
        if isinstance(primary, torch.Tensor):
            listed, rows, row_shape = False, primary.shape[0], tuple(primary.shape[1:]) or None
        else:
            listed, rows, row_shape = True, len(primary), None
        leaves, structure = flatten(call, lambda node: _is_row_list(node, rows, listed))
        if any(map(_takes_gradients, leaves)):
            return None
        roles = [_role(leaf, rows) for leaf in leaves]
        ids = _position_ids(call)
        marks = tuple([self._mark(leaf, role, id(leaf) in ids) for leaf, role in zip(leaves, roles, strict=True)])
        signature = (call.name, structure, marks)
        positions = _positions(primary)
        return Batchable(leaves, structure, roles, rows, positions, listed, row_shape, call.name, marks, signature)

    def _mark(self, leaf: Any, role: Role, is_position_ids: bool) -> Hashable:
        """This leaf's part of the signature."""
        if role is Role.BATCHED:
            # denoisers may read the first row's position ids for all rows (FLUX.2 does)
            content = self._digest(leaf) if is_position_ids else None
            return (role, leaf.dtype, leaf.device, tuple(leaf.shape[1:]), content)
        if role is Role.SCALAR:
            return (role, leaf.dtype, leaf.device)
        if role is Role.LISTED:
            return (role, leaf[0].dtype, leaf[0].ndim) if isinstance(leaf[0], torch.Tensor) else (role, repr(leaf[0]))
        if isinstance(leaf, torch.Tensor):
            return (role, leaf.dtype, leaf.device, tuple(leaf.shape), self._digest(leaf))
        return (role, type(leaf), leaf if isinstance(leaf, str | int | float | bool | None) else id(leaf))

    def _digest(self, tensor: torch.Tensor) -> bytes:
        known = self._digests[tensor] if tensor in self._digests else None  # noqa: SIM401  # its get() is untyped
        if known is None or known[0] != tensor._version:
            known = (tensor._version, digest(tensor))
            self._digests[tensor] = known
        result: bytes = known[1]
        return result


def digest(tensor: torch.Tensor) -> bytes:
    """A digest of the tensor's bytes (not of its shape or dtype)."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.blake2b(flat.view(torch.uint8).numpy().data, digest_size=16).digest()


def _position_ids(call: Call) -> set[int]:
    """The ``id()`` of each tensor of token positions (``img_ids``, ``txt_ids``) that a denoiser receives."""
    if call.component.split(".")[0] not in DENOISERS:
        return set()
    return {id(value) for name, value in call.kwargs.items() if name.endswith("ids")}


def _is_row_list(node: Any, rows: int, listed: bool) -> bool:
    """True if ``node`` is a list with one element per row.

    If the primary argument is a list, every list of tensors of its length is one. If it is a tensor, a list of tensors
    has the rows inside its elements (ControlNet residuals), and only a list of equal plain values counts.
    """
    if type(node) is not list or len(node) != rows or rows == 0:  # not isinstance, which is slow for tensors
        return False
    if all(map(torch.is_tensor, node)):
        return listed
    plain = not any(map(torch.is_tensor, pytree.tree_leaves(node)))
    return plain and all(element == node[0] for element in node)


def _primary(call: Call) -> torch.Tensor | list[torch.Tensor] | None:
    for value in (*call.args, *call.kwargs.values()):
        if isinstance(value, torch.Tensor) and value.ndim > 0:
            return value
        if isinstance(value, list) and value and all(map(torch.is_tensor, value)):
            return value
    return None


def _takes_gradients(leaf: Any) -> bool:
    """True if the call is part of an autograd graph: merged calls would share one, which the first backward frees."""
    if isinstance(leaf, torch.Tensor):
        return leaf.requires_grad
    return isinstance(leaf, list) and any(map(_takes_gradients, leaf))


def _role(leaf: Any, rows: int) -> Role:
    if isinstance(leaf, torch.Tensor):
        if leaf.ndim == 0:
            return Role.SCALAR
        return Role.BATCHED if leaf.shape[0] == rows else Role.SHARED
    return Role.LISTED if isinstance(leaf, list) else Role.SHARED


def _positions(primary: torch.Tensor | list[torch.Tensor]) -> int:
    if isinstance(primary, list):
        return sum(element.numel() // max(1, element.shape[0] if element.ndim > 2 else 1) for element in primary)
    if primary.ndim == 3:
        return primary.shape[0] * primary.shape[1]
    return primary.numel() // max(1, primary.shape[1] if primary.ndim > 3 else 1)
