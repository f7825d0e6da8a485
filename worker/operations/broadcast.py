"""Closes a trainer's process group when a broadcast over it cannot be used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ...protocol.errors import SafelightError
from ..weights.transport.groups import ProcessGroups
from ..weights.transport.sources import Rejected


@contextmanager
def closing_on_failure(groups: ProcessGroups, name: str) -> Iterator[None]:
    """On failure or refusal, close the group so that every member, the trainer included, fails fast.

    Tensors that were announced and not received may still be sent; the next broadcast would take them for its own.
    """
    try:
        yield
    except (Rejected, SafelightError) as failed:
        if not groups.leave(name):
            raise
        raise _with_group_closed(failed, name) from failed


def _with_group_closed(failed: Rejected | SafelightError, group: str) -> Rejected | SafelightError:
    error = failed.error if isinstance(failed, Rejected) else failed
    closed = type(error)(f"{error.message} The group {group!r} is closed; make it again.", field=error.field)
    return Rejected(closed, failed.report) if isinstance(failed, Rejected) else closed
