"""Operations: what is done between requests, on every rank of every replica, or on none.

One operation in messages::

    server ──Operate──▶ scheduler ──Perform (step by step)──▶ every replica
    server ◀──Operated or Failed── scheduler ◀──Performed (after each step)── every replica

An update has the steps *prepare* (decode and check, nothing is written), *write* (with an undo copy) and *commit* (the
undo copy goes, the version changes). When a replica fails in one of the first two, all of them *roll back*. Every other
operation has one step.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from .adapters import AdapterChange, AdapterSource
from .tensor_sources import Source

Barrier = Literal["wait", "abort", "in_place"]
"""What becomes of requests that came before an operation: they end first, they are ended, or they go on after it."""

Step = Literal["prepare", "write", "journal", "commit", "rollback", "release"]
"""*journal* has one replica write down what is to be committed; *rollback* undoes what was written; *release* lets go
of what was prepared and not written, and of a group that not all have joined."""


WEIGHTS, CACHES = "weights", "caches"


class Update(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Write the tensors of ``source``. With ``update_id`` it is part of a begun update, else one of its own.

    ``require_complete`` asks for every tensor of each module that ``source`` has.
    """

    source: Source
    weight_version: str | None = None
    flush_cache: bool = True
    update_id: str | None = None
    require_complete: bool = False


class Begin(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Begin an update of several parts, which ends by ``timeout_s`` seconds without one."""

    update_id: str
    weight_version: str | None = None
    modules: list[str] | None = None
    timeout_s: float = 300.0


class Commit(msgspec.Struct, tag=True, frozen=True):
    """End a begun update; with ``require_complete`` only if every tensor of the modules that it touched came.

    With ``weight_version`` it has that name, whatever its begin said.
    """

    update_id: str
    require_complete: bool = False
    weight_version: str | None = None


class Abort(msgspec.Struct, tag=True, frozen=True):
    """End a begun update, whichever is begun where ``update_id`` is ``None``; every byte is as it was before."""

    update_id: str | None


class Digests(msgspec.Struct, tag=True, frozen=True):
    """Tell the SHA-256 of ``modules``, of all of them when ``None``; with ``detail`` of every tensor too."""

    modules: list[str] | None = None
    detail: bool = False


class CheckTensors(msgspec.Struct, tag=True, frozen=True):
    """Compare the SHA-256 of tensors of ``module``, by checkpoint name, with what is expected."""

    module: str
    expected: dict[str, str]


class Flush(msgspec.Struct, tag=True, frozen=True):
    """Forget everything that is derived from weights or requests and could be made again."""


class Sleep(msgspec.Struct, tag=True, frozen=True):
    """Give memory back to the machine; generation is refused until :class:`Wake`.

    A tag is a module's name, ``WEIGHTS`` for all modules, or ``CACHES``.
    """

    tags: list[str]


class Wake(msgspec.Struct, tag=True, frozen=True):
    """Bring back what :class:`Sleep` let go."""

    tags: list[str]


class Join(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Every rank of every replica joins the trainer's process group, from ``rank_offset`` on.

    Nothing in the group is waited for longer than ``timeout_s``: the others, and then each tensor.
    """

    address: str
    port: int
    rank_offset: int
    world_size: int
    group: str
    backend: str
    timeout_s: float


class Leave(msgspec.Struct, tag=True, frozen=True):
    """Every rank leaves the trainer's process group; all of its groups where ``group`` is None."""

    group: str | None


class TakeSnapshot(msgspec.Struct, tag=True, frozen=True):
    """Write a snapshot of ``modules``, for a replica that joined later: whole tensors, in safetensors files.

    ``folder`` is made anew in the server's shared-memory directory.
    """

    modules: list[str]
    folder: str


class Save(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Write ``adapter`` into its folder, which is made: the parts that came before, and this one, of ``source``.

    Of a begun update those are in the folder ``onto``, if there are any. Otherwise they are what is loaded under the
    adapter's nickname. ``version`` names the weights that this is a part of, and ``complete`` says that it is the last.
    ``alpha`` is of the layers in it, and ``rank`` the largest of these.
    """

    source: Source
    adapter: AdapterSource
    version: str | None = None
    alpha: float | None = None
    rank: int | None = None
    complete: bool = False
    update_id: str | None = None
    onto: str | None = None


class Settled(msgspec.Struct, tag=True, frozen=True):
    """Do nothing. When it is done, so is all that came before."""


class Adapt(msgspec.Struct, tag=True, frozen=True):
    """Change the adapters. Like an update it is prepared, written and committed.

    One that ``publishes`` makes a new version of the weights, ``weight_version`` if it is given.
    """

    change: AdapterChange
    publishes: bool = False
    weight_version: str | None = None


AboutWeights = Update | Begin | Commit | Abort | Digests | CheckTensors | TakeSnapshot | Join | Leave
AboutAdapters = Save | Adapt | Settled
Operation = AboutWeights | AboutAdapters | Flush | Sleep | Wake


class Operate(msgspec.Struct, tag=True, frozen=True):
    """Do ``operation`` on every replica, in the order of arrival among requests and operations."""

    request_id: str
    operation: Operation
    barrier: Barrier = "in_place"


class Pause(msgspec.Struct, tag=True, frozen=True):
    """Stop generation; what runs ends first, is ended, or stops where it is. New requests wait."""

    request_id: str
    mode: Barrier = "wait"


class Continue(msgspec.Struct, tag=True, frozen=True):
    """Go on after :class:`Pause`."""

    request_id: str


class AbortRequests(msgspec.Struct, tag=True, frozen=True):
    """End requests: all where ``name`` is ``None``, else the one with that id and, unless ``exact``, those that their
    clients called so."""

    request_id: str
    name: str | None
    exact: bool = False


class ListAdapters(msgspec.Struct, tag=True, frozen=True):
    """Tell which adapters there are, at once."""

    request_id: str


class Perform(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """The scheduler's order to one replica: ``step`` of the operation ``number``.

    ``operation`` comes with its first step, and ``weight_version`` with *journal* and *commit*. One of the replicas
    ``leads``: it does what is to be done once.
    """

    number: int
    step: Step
    leads: bool
    operation: Operation | None = None
    weight_version: str | None = None


class SetPaused(msgspec.Struct, tag=True, frozen=True):
    """Make no forward, or go on."""

    paused: bool
