"""The callback that reports progress of long work."""

from __future__ import annotations

from collections.abc import Callable

OnProgress = Callable[[], object]
"""Called after each part of long work. A replica that reports no progress counts as stalled."""
