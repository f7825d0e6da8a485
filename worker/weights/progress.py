"""The callback by which long work reports that it goes on."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[], object]
"""Called after each part of long work. A replica that reports no progress counts as stalled."""
