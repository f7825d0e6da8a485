"""What one run of ``safelight verify`` is to do; the launcher writes it to each rank's standard input."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

DType = Literal["float32", "bfloat16"]
DTYPES: tuple[DType, ...] = ("float32", "bfloat16")


CANNOT_START, MISSES_ANOTHER = 2, 4
"""Exit statuses of a rank: it said in its failure file why it cannot do its task; another one is gone."""


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """``components`` empty: all. ``staged`` ``None``: where both sides would not fit into memory together.

    ``directory`` is the run's own, for what its processes leave to each other.
    """

    model: str
    directory: str
    policy: str
    dtypes: list[DType]
    components: list[str]
    tp: int = 1
    fused: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    staged: bool | None = None
    rank: int = 0

    @property
    def directories(self) -> list[str]:
        return [self.directory]

    @property
    def meeting_place(self) -> str:
        return f"{self.directory}/store"

    @property
    def report(self) -> Path:
        """Where rank 0 leaves the report."""
        return Path(self.directory, "report.json")

    @property
    def failure(self) -> Path:
        """Where this rank says, in a sentence, why it cannot do its task."""
        return Path(self.directory, f"failure-{self.rank}")
