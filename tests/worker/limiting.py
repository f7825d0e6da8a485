"""What every rank does in the test of the limit on collectives; in a module that other processes can import."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from safelight.worker.parallel.ranks import RankLost, Ranks


def gives_up_on_a_silent_rank(ranks: Ranks, ended: Path) -> None:
    """Rank 1 stays connected, and takes no part in what rank 0 begins."""
    ranks.exchange(b"")
    ranks.limit(0.2)
    if ranks.rank == 0:
        with pytest.raises(RankLost):
            ranks.exchange(b"")
        ended.touch()
    while not ended.exists():
        time.sleep(0.01)
    os._exit(0)  # the group is broken
