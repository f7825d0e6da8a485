"""How work that takes long says that it goes on."""

from __future__ import annotations

from collections.abc import Callable

Sign = Callable[[], object]
"""Called now and then by what takes long: it is progress, without which the replica would count as hanging."""
