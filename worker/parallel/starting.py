"""Steps of a replica's start that every rank takes for itself: if one rank fails, all fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from ...protocol.errors import StartFailed
from .ranks import Ranks

T = TypeVar("T")


class ReplicaStartFailed(StartFailed):
    """The start failed on at least one rank; every rank raises this with the same message."""


def all_or_none(ranks: Ranks, attempt: Callable[[], T]) -> T:
    """Return the result of ``attempt``, which must not use collectives. All ranks must call this together.

    Raises ``ReplicaStartFailed`` on every rank if ``attempt`` raises ``StartFailed`` on any; the message is that of
    the lowest such rank.
    """
    result, why = None, b""
    try:
        result = attempt()
    except StartFailed as failed:
        why = failed.message.encode()
    for message in ranks.all_gather_bytes(why):
        if message:
            raise ReplicaStartFailed(message.decode())
    assert result is not None
    return result
