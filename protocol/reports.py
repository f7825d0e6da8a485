"""What replicas say of an operation that they have done."""

from __future__ import annotations

import msgspec

from .adapters import AdapterState
from .errors import ErrorInfo
from .operations import Step


class Invalid(msgspec.Struct, frozen=True):
    """A tensor that cannot be written, and why."""

    name: str
    reason: str


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What a replica has to say of an operation. What an operation does not have is empty.

    ``updated`` counts the tensors of each module, of which ``expected`` is how many it has; ``complete`` are the
    modules of which every tensor was given, in all parts together, and ``left_out`` are names that no checkpoint has.
    ``weight_version`` is the new one, after a commit. ``digests``, ``tensors``, ``aliases`` (further names of tensors)
    and ``ignored`` (patterns of names that are read over) are by module. ``given`` is equal for replicas that were
    given the same tensors. ``left`` says that there was a group to leave. ``adapters`` is what will be after a change
    of them, and ``told`` are sentences about it.
    ``waiting`` are factors whose counterparts did not come yet.
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
    told: list[str] = []
    waiting: list[str] = []


class TensorDigest(msgspec.Struct, frozen=True):
    """Of one whole tensor, with its dtype as torch writes it."""

    sha256: str
    dtype: str
    shape: list[int]


class Performed(msgspec.Struct, tag=True, frozen=True):
    """A replica has done a step. ``error`` says why it could not: then it has done nothing."""

    number: int
    step: Step
    report: Report
    error: ErrorInfo | None = None


class Operated(msgspec.Struct, tag=True, frozen=True):
    """Every replica has done an operation. ``reports`` are theirs, by number; ``asleep`` is what was put away,
    and ``adapters`` are those that are there now. ``unable`` says why no replica can serve after it."""

    request_id: str
    reports: dict[int, Report]
    weight_version: str | None
    asleep: list[str]
    adapters: AdapterState
    unable: str | None = None
