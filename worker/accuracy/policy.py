"""The accuracy policy, a TOML file: thresholds, and exemptions with their reason and end."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta
from packaging.requirements import InvalidRequirement, Requirement

from ...protocol.errors import StartFailed
from .report import Distance

POLICY = Path(__file__).with_name("policy.toml")
"""The default policy."""

_Positive = Annotated[float, Meta(gt=0)]
_Sentence = Annotated[str, Meta(min_length=10)]


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One component in one precision, to which exemptions refer."""

    component: str
    cls: str
    pipeline: str
    dtype: str
    tp: int


class Exemption(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Cases that the policy exempts. ``None`` matches every case. ``until`` is a date or a release (torch>=3)."""

    reason: _Sentence
    until: str
    component: str | None = None
    cls: str | None = None
    pipeline: str | None = None
    dtype: str | None = None
    tp: int | None = None

    def __post_init__(self) -> None:
        self.over()
        if not self._named():
            raise ValueError("it names no component, cls, pipeline, dtype or tp, and would hold for everything")

    def holds(self, case: Case) -> bool:
        return not self.over() and all(getattr(case, name) == wanted for name, wanted in self._named().items())

    def over(self) -> bool:
        """True if the date has passed or the release is installed. Raises ``ValueError`` if ``until`` is neither."""
        try:
            return datetime.date.today() >= datetime.date.fromisoformat(self.until)
        except ValueError:
            return _installed(self.until)

    def _named(self) -> dict[str, str | int]:
        fields = {name: getattr(self, name) for name in Case.__struct_fields__}
        return {name: wanted for name, wanted in fields.items() if wanted is not None}


class Float32(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    relative_l2: _Positive


class LowPrecision(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    error_ratio: _Positive
    bias: _Positive


class Quantized(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    relative_l2: _Positive = 0.1


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Thresholds and exemptions."""

    float32: Float32
    low_precision: LowPrecision
    quantized: Quantized = Quantized()
    skips: Sequence[Exemption] = ()

    def skip(self, case: Case) -> Exemption | None:
        return next((one for one in self.skips if one.holds(case)), None)

    def fault(self, runtime: Distance, plain: Distance | None) -> str | None:
        """The first violated threshold in a few words; ``None`` if all hold.

        In fp32 ``runtime`` is the distance from the plain component, and ``plain`` is ``None``. In lower precision both
        are distances from the fp64 reference.
        """
        if not runtime.finite:
            return "NaN or Inf"
        if plain is not None and not plain.finite:
            return "NaN or Inf in the plain component, so there is nothing to compare with"
        if plain is None:
            most = self.float32.relative_l2
            return None if runtime.relative_l2 <= most else f"relative L2 {runtime.relative_l2:.1e} above {most:.0e}"
        return self._low_precision_fault(runtime, plain)

    def _low_precision_fault(self, runtime: Distance, plain: Distance) -> str | None:
        limits = self.low_precision
        for words, ours, theirs in (
            ("RMS error", runtime.rms, plain.rms),
            ("largest error", runtime.max_abs, plain.max_abs),
        ):
            if ours > limits.error_ratio * theirs:
                return f"{words} {ours:.2e} above {limits.error_ratio} times the plain component's {theirs:.2e}"
        if abs(runtime.bias) > max(limits.bias * runtime.rms, limits.error_ratio * abs(plain.bias)):
            return (
                f"bias {runtime.bias:.2e} above {limits.bias} of the RMS error {runtime.rms:.2e}, "
                f"and above {limits.error_ratio} times the plain component's {plain.bias:.2e}"
            )
        return None


def load_policy(file: Path = POLICY) -> Policy:
    """Read ``file``. Raises ``StartFailed`` that names the file and the mistake."""
    try:
        return msgspec.toml.decode(file.read_bytes(), type=Policy)
    except (OSError, msgspec.MsgspecError) as error:
        raise StartFailed(f"The policy {file} cannot be used: {error}.") from error


def _installed(release: str) -> bool:
    try:
        wanted = Requirement(release)
    except InvalidRequirement:
        raise ValueError(f"`until` is {release!r}, neither a date (2027-01-31) nor a release (torch>=3)") from None
    if not wanted.specifier:
        raise ValueError(f"`until` is {release!r}, and says no version")
    try:
        return wanted.specifier.contains(metadata.version(wanted.name), prereleases=True)
    except metadata.PackageNotFoundError:
        return False
