"""What every rank attempts for itself while a replica starts, and none may go on from without the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from ...protocol.errors import StartFailed
from .ranks import Ranks

Made = TypeVar("Made")


class FailedTogether(StartFailed):
    """An attempt failed on at least one rank; every rank raises this with the same message."""


def all_or_none(ranks: Ranks, attempt: Callable[[], Made]) -> Made:
    """What ``attempt``, in which ranks do not speak with each other, returns. All ranks must call this together.

    Raises ``FailedTogether`` with the first rank's message where it raises ``StartFailed`` on any.
    """
    made, why = None, b""
    try:
        made = attempt()
    except StartFailed as failed:
        why = failed.message.encode()
    for message in ranks.exchange(why):
        if message:
            raise FailedTogether(message.decode())
    assert made is not None
    return made
