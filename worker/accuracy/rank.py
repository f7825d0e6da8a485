"""``python -m safelight.worker.accuracy.rank``: one rank of a verification, its task on standard input."""

from __future__ import annotations

import gc
import signal
import sys

import msgspec

from ...process.child import read_child
from ...protocol.errors import StartFailed
from .task import CANNOT_START, MISSES_ANOTHER, VerificationTask

_TIMEOUT_S = 3600.0
"""Timeout of collectives: ranks wait in one while rank 0 computes references, which is slow in fp64."""


def main() -> int:
    task = read_child(VerificationTask)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return _run(task)
    except StartFailed as failed:
        task.failure.write_text(failed.message)
        return CANNOT_START


def _run(task: VerificationTask) -> int:
    import torch  # after the pipe to the launcher is watched

    from ...protocol.config import Config
    from ..parallel.device import find_device
    from ..parallel.mesh import join, leave
    from ..parallel.ranks import RankLost
    from .verification import verify

    gc.freeze()  # so that collections between cases skip the libraries' objects
    torch.set_num_threads(max(1, torch.get_num_threads() // task.tp))
    torch.set_grad_enabled(False)
    device = find_device(Config(device=task.device, tp=task.tp), 0, task.rank)
    try:
        mesh = join(task.rank, {"tp": task.tp}, task.rendezvous_path, device, _TIMEOUT_S)
        report = verify(task, mesh.tp, device, lambda row: print(row.progress, file=sys.stderr, flush=True))
    except RankLost:
        return MISSES_ANOTHER
    if task.rank == 0:
        task.report.write_bytes(msgspec.msgpack.encode(report))
    leave(mesh)
    return 0


if __name__ == "__main__":
    sys.exit(main())
