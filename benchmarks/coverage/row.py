"""The findings about one pipeline."""

from __future__ import annotations

from typing import Literal

import msgspec

from .catalogue import Kind

Stage = Literal["left out", "build", "diffusers", "load", "serve", "done"]


class Row(msgspec.Struct):
    """``stage`` is how far it came, and ``reason`` what ended it there, or a remark.

    ``mode`` is the self-test's; ``calls`` and ``forwards`` are those of three requests together; ``worst`` is the
    largest difference that merging made; ``parallel`` says how two ranks did.
    """

    pipeline: str
    kind: Kind
    stage: Stage = "build"
    reason: str = ""
    served: bool = False
    bitwise: bool = False
    mode: str = ""
    calls: int = 0
    forwards: int = 0
    worst: float = 0.0
    parallel: str = ""

    @property
    def merged(self) -> bool:
        """True if calls of different requests were merged within the tolerance."""
        return self.mode == "merged" and self.served and self.worst <= TOLERANCE


AMPLIFIED = "yes, in float64; rounding makes "
"""The result for two ranks that differ only by rounding, which the pipeline amplifies."""

TOLERANCE = 1e-4
"""Largest difference of a pixel in [0, 1] between a merged request and plain diffusers."""
