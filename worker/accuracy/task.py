"""The task of one run of ``safelight verify``; the launcher writes it to each rank's standard input."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

DType = Literal["float32", "bfloat16"]
DTYPES: tuple[DType, ...] = ("float32", "bfloat16")


CANNOT_START, MISSES_ANOTHER = 2, 4
"""Exit statuses of a rank: it wrote the reason to its failure file; it lost another rank."""


class VerificationTask(msgspec.Struct, frozen=True, kw_only=True):
    """Empty ``components``: all. ``staged`` ``None``: only if both sides do not fit into memory together.

    ``directory`` belongs to the run; its processes exchange files there.
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
    def rendezvous_path(self) -> str:
        return f"{self.directory}/store"

    @property
    def report(self) -> Path:
        """The file to which rank 0 writes the report."""
        return Path(self.directory, "report.json")

    @property
    def failure(self) -> Path:
        """The file to which this rank writes one sentence about its failure."""
        return Path(self.directory, f"failure-{self.rank}")
