"""The report of a verification, with one row per name of a call, as JSON and as Markdown."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec


class Distance(msgspec.Struct, frozen=True, kw_only=True):
    """An output's distance from a reference: ``rms`` and ``bias`` are root mean square and mean of the differences.

    ``relative_l2`` is absolute if the reference is zero. An output that is not finite has infinite distances.
    """

    cosine: float
    relative_l2: float
    max_abs: float
    rms: float
    bias: float
    finite: bool


class ReportRow(msgspec.Struct, frozen=True, kw_only=True):
    """The calls of one name, in one precision.

    ``runtime`` is the worst distance among all outputs on all ranks: in fp32 from the plain component, in lower
    precision from the fp64 reference; ``plain`` is then the plain component's distance from that reference. ``note`` is
    the violated threshold or the reason for a skip. ``staged``: one side at a time was in memory.
    """

    call: str
    component: str
    cls: str
    dtype: str
    status: Literal["passed", "failed", "skipped"]
    note: str = ""
    runtime: Distance | None = None
    plain: Distance | None = None
    staged: bool = False

    @property
    def progress(self) -> str:
        return f"{self.call} ({self.cls}) in {self.dtype}: {self.status}" + (f", {self.note}" if self.note else "")


class VerificationReport(msgspec.Struct, frozen=True, kw_only=True):
    """All rows of one run, and its setting."""

    model: str
    pipeline: str
    tp: int
    fused: bool
    device: str
    versions: dict[str, str]
    seconds: float
    rows: list[ReportRow]

    @property
    def passed(self) -> bool:
        return all(row.status != "failed" for row in self.rows)

    @property
    def compared(self) -> bool:
        """False if the policy skipped every row."""
        return any(row.status != "skipped" for row in self.rows)

    def to_json(self) -> str:
        fields = {"passed": self.passed, **msgspec.to_builtins(self)}
        return msgspec.json.format(msgspec.json.encode(fields), indent=2).decode() + "\n"

    def to_markdown(self) -> str:
        how = f"--tp {self.tp}" + (" --fuse-projections" if self.fused else "")
        counts = ", ".join(f"{sum(row.status == name for row in self.rows)} {name}" for name in _STATUSES)
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        table = "\n".join(["| " + " | ".join(_HEADINGS) + " |", "|---" * len(_HEADINGS) + "|", *map(_line, self.rows)])
        return (
            f"# Accuracy of {self.model}\n\n{self.pipeline}, {how}, {self.device}; {versions}; "
            f"{self.seconds:.1f} s: {counts}.\n\n{table}\n"
        )

    def write(self, folder: Path) -> None:
        """Write ``accuracy.md`` and ``accuracy.json`` to ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "accuracy.md").write_text(self.to_markdown())
        (folder / "accuracy.json").write_text(self.to_json())


_STATUSES = ("passed", "failed", "skipped")
_HEADINGS = (
    "call", "class", "dtype", "cosine", "relative L2", "largest error", "RMS error ÷ plain's", "largest ÷ plain's",
    "bias ÷ RMS", "",
)  # fmt: skip


def _line(row: ReportRow) -> str:
    cells = [row.call, row.cls, row.dtype, *_figures(row), row.status + (f": {row.note}" if row.note else "")]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _figures(row: ReportRow) -> list[str]:
    found, plain = row.runtime, row.plain
    if found is None:
        return [""] * 6
    figures = [f"{found.cosine:.8f}", f"{found.relative_l2:.1e}", f"{found.max_abs:.1e}"]
    if plain is None:
        return [*figures, "", "", ""]
    ratios = (_ratio(found.rms, plain.rms), _ratio(found.max_abs, plain.max_abs), _ratio(abs(found.bias), found.rms))
    return [*figures, *(f"{ratio:.2f}" for ratio in ratios)]


def _ratio(one: float, other: float) -> float:
    return one / other if other else 0.0 if one == 0 else float("inf")
