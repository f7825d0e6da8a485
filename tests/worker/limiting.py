"""Each rank's part in tests of collectives; in a module that other processes can import."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from safelight.worker.parallel.mesh import Mesh
from safelight.worker.parallel.ranks import RankLost


def gives_up_on_a_silent_rank(mesh: Mesh, ended: Path) -> None:
    """Rank 1 stays connected, and takes no part in what rank 0 begins."""
    ranks = mesh.tp
    ranks.all_gather_bytes(b"")
    mesh.set_timeout(0.2)
    if ranks.rank == 0:
        with pytest.raises(RankLost):
            ranks.all_gather_bytes(b"")
        ended.touch()
    while not ended.exists():
        time.sleep(0.01)
    os._exit(0)  # the group is broken


def votes_without_the_device(mesh: Mesh) -> None:
    """A device on which there is no memory at all."""
    ranks = mesh.world
    full = replace(ranks, device=torch.device("meta"))
    assert full.all_gather_bytes(b"x" * ranks.rank) == [b"x" * rank for rank in range(ranks.size)]
    mesh.agree("it has failed alike")
