"""The limit of open file descriptors: raised for a server's processes, and divided between connections and the rest."""

from __future__ import annotations

import resource

RESERVE = 256
"""Descriptors that are kept for the server itself: sockets to its processes, files, uploads."""


def raise_descriptor_limit() -> int:
    """Let this process, and its children, have as many descriptors as the system allows it. Returns how many."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def room_for_connections(wanted: int) -> int:
    """``wanted``, or as many as the descriptors of this process allow."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return wanted if soft == resource.RLIM_INFINITY else max(1, min(wanted, soft - min(RESERVE, soft // 2)))
