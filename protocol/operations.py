"""Operations: work between requests, done on every rank of every replica or on none.

One operation in messages::

    server ──Operate──▶ scheduler ──Perform (step by step)──▶ every replica
    server ◀──Operated or Failed── scheduler ◀──Performed (after each step)── every replica

An update has the steps *prepare* (decode and check, nothing is written), *write* (with an undo log) and *commit* (drop
the undo log, change the version). When a replica fails in one of the first two, all of them *roll back*. Every other
operation has one step.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from .adapters import AdapterChange, AdapterSource
from .tensor_sources import Source

Barrier = Literal["wait", "abort", "in_place"]
"""Requests that came before an operation finish first, are aborted, or continue after it."""

OperationStep = Literal["prepare", "write", "journal", "commit", "rollback", "release"]
"""*journal* has one replica record the commit; *rollback* undoes writes; *release* drops prepared work that was not
written, and a process group that not all ranks joined."""


CACHES = "caches"


class Update(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Write the tensors of ``source``, as part of the begun update ``update_id`` or as an update of its own.

    ``require_complete`` asks for every tensor of each module that ``source`` has.
    """

    source: Source
    weight_version: str | None = None
    update_id: str | None = None
    require_complete: bool = False


class Begin(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Begin an update of several parts; it is aborted after ``timeout_s`` seconds without a part."""

    update_id: str
    weight_version: str | None = None
    modules: list[str] | None = None
    timeout_s: float = 300.0


class Commit(msgspec.Struct, tag=True, frozen=True):
    """Commit a begun update; ``require_complete`` demands every tensor of the modules that it touched.

    ``weight_version`` overrides the version of its begin.
    """

    update_id: str
    require_complete: bool = False
    weight_version: str | None = None


class Abort(msgspec.Struct, tag=True, frozen=True):
    """Abort a begun update (any, if ``update_id`` is ``None``) and restore every byte."""

    update_id: str | None


class Digests(msgspec.Struct, tag=True, frozen=True):
    """Report the SHA-256 of ``modules`` (``None``: all), with ``detail`` also of every tensor."""

    modules: list[str] | None = None
    detail: bool = False


class CheckTensors(msgspec.Struct, tag=True, frozen=True):
    """Compare the SHA-256 of tensors of ``module``, by checkpoint name, with what is expected."""

    module: str
    expected: dict[str, str]


class Flush(msgspec.Struct, tag=True, frozen=True):
    """Drop caches derived from weights or requests."""


class Sleep(msgspec.Struct, tag=True, frozen=True):
    """Release memory to the machine; generation is refused until :class:`Wake`.

    A tag is a module's name, or ``CACHES``. No tag stands for several, so that a set of tags says what sleeps.
    """

    tags: list[str]


class Wake(msgspec.Struct, tag=True, frozen=True):
    """Restore the memory that :class:`Sleep` released."""

    tags: list[str]


class Join(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Every rank of every replica joins the trainer's process group, from ``rank_offset`` on.

    ``timeout_s`` limits the wait for the other members, and then for each tensor.
    """

    address: str
    port: int
    rank_offset: int
    world_size: int
    group: str
    backend: str
    timeout_s: float


class Leave(msgspec.Struct, tag=True, frozen=True):
    """Every rank leaves the trainer's process group, or all groups if ``group`` is ``None``."""

    group: str | None


class TakeSnapshot(msgspec.Struct, tag=True, frozen=True):
    """Write a snapshot of ``modules``, for a replica that joined later: whole tensors, in safetensors files.

    ``folder`` (of :func:`snapshot_folder`) is made anew in the server's shared-memory directory.
    """

    modules: list[str]
    folder: str


def snapshot_folder(replica: int) -> str:
    """The folder of every snapshot for ``replica``: each replaces one that was not read."""
    return f"replica-{replica}"


class Save(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Write ``adapter`` into its new folder: the earlier parts, and the part in ``source``.

    The earlier parts of a begun update are in the folder ``onto``, if there are any; otherwise they are the adapter
    loaded under this nickname. ``version`` is the weight version that the part belongs to, and ``complete`` marks the
    last part. ``alpha`` applies to the layers of the part, and ``rank`` is their largest rank.
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
    """Do nothing; its reply means that everything before it is done."""


class Adapt(msgspec.Struct, tag=True, frozen=True):
    """Change the adapters; prepared, written and committed like an update.

    A change that ``publishes`` makes a new weight version, named ``weight_version`` if given.
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
    """Pause generation: running requests finish first, are aborted, or stop where they are. New requests wait."""

    request_id: str
    mode: Barrier = "wait"


class Continue(msgspec.Struct, tag=True, frozen=True):
    """Continue after :class:`Pause`."""

    request_id: str


class AbortRequests(msgspec.Struct, tag=True, frozen=True):
    """Abort all requests (``name`` is ``None``), or the request with that id and, unless ``exact``, requests with that
    ``X-Request-Id``."""

    request_id: str
    name: str | None
    exact: bool = False


class ListAdapters(msgspec.Struct, tag=True, frozen=True):
    """Report the adapters, at once."""

    request_id: str


class Perform(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """The scheduler's order to one replica: ``step`` of the operation ``number``.

    ``operation`` comes with its first step, and ``weight_version`` with *journal* and *commit*. Exactly one replica
    ``is_primary``: it does the work that must happen once.
    """

    number: int
    step: OperationStep
    is_primary: bool
    operation: Operation | None = None
    weight_version: str | None = None


class SetPaused(msgspec.Struct, tag=True, frozen=True):
    """Halt forwards, or continue."""

    paused: bool
