"""Replicas' reports of operations."""

from __future__ import annotations

import msgspec

from .adapters import AdapterState
from .errors import ErrorInfo
from .operations import OperationStep


class Invalid(msgspec.Struct, frozen=True):
    """A tensor that cannot be written, and why."""

    name: str
    reason: str


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """A replica's report of an operation; fields that do not apply are empty.

    ``updated`` counts the tensors written per module, ``expected`` those that the module has; ``complete`` names the
    modules whose tensors all came, over all parts, and ``left_out`` names tensors that checkpoints lack.
    ``weight_version`` is the new one, after a commit. ``digests``, ``tensors``, ``aliases`` (further names of tensors)
    and ``ignored`` (patterns of skipped names) are by module. ``given`` is equal for replicas that received the same
    tensors. ``left`` is true if there was a group to leave. ``adapters`` is the state after a change, and ``notes``
    describe it in sentences. ``waiting`` names factors whose counterparts have not come yet.
    """

    updated: dict[str, int] = {}
    expected: dict[str, int] = {}
    complete: list[str] = []
    left_out: list[str] = []
    unknown: list[str] = []
    invalid: list[Invalid] = []
    invalidated: list[str] = []
    weight_version: str | None = None
    ranks: int = 1
    digests: dict[str, str] = {}
    tensors: dict[str, dict[str, TensorDigest]] = {}
    aliases: dict[str, dict[str, str]] = {}
    ignored: dict[str, list[str]] = {}
    missing: list[str] = []
    mismatched: list[str] = []
    files: dict[str, list[str]] = {}
    left: bool = False
    given: str = ""
    adapters: AdapterState | None = None
    notes: list[str] = []
    waiting: list[str] = []


class TensorDigest(msgspec.Struct, frozen=True):
    """The digest of one full tensor; ``dtype`` is torch's name."""

    sha256: str
    dtype: str
    shape: list[int]


class Performed(msgspec.Struct, tag=True, frozen=True):
    """A replica has finished a step. With ``error``, it has done nothing."""

    number: int
    step: OperationStep
    report: Report
    error: ErrorInfo | None = None


class Operated(msgspec.Struct, tag=True, frozen=True):
    """Every replica has finished an operation. ``reports`` are by replica number; ``asleep`` names released tags,
    ``adapters`` is the current state, and ``unable`` says why no replica can serve now."""

    request_id: str
    reports: dict[int, Report]
    weight_version: str | None
    asleep: list[str]
    adapters: AdapterState
    unable: str | None = None
