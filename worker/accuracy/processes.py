"""The processes of a verification, one per rank; if one fails, all end."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from types import TracebackType
from typing import Self

import msgspec

from .task import MISSES_ANOTHER, VerificationTask

_PROGRAM = (sys.executable, "-P", "-m", f"{__package__}.rank")
"""``-P`` keeps files in the current folder from shadowing installed modules."""

_LOOK_S = 0.05
_TERMINATION_S = 5.0


class VerificationRanks:
    """A context that starts one process per rank of ``task`` and ends the remaining ones on leaving."""

    def __init__(self, task: VerificationTask) -> None:
        self.tasks = [msgspec.structs.replace(task, rank=rank) for rank in range(task.tp)]
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        for task in self.tasks:
            process = subprocess.Popen(
                _PROGRAM,
                stdin=subprocess.PIPE,  # the system closes it however this process ends, which ends the rank
                stdout=sys.stderr,
                start_new_session=True,  # so that Ctrl-C in a terminal reaches this process alone
            )
            self._processes.append(process)
            assert process.stdin is not None, "asked for above"
            with contextlib.suppress(BrokenPipeError):  # it has exited already, which `wait` reports
                process.stdin.write(msgspec.json.encode(task) + b"\n")
                process.stdin.flush()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            try:
                process.wait(_TERMINATION_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def wait(self) -> tuple[VerificationTask, int] | None:
        """Wait until all ranks succeed, or return the first failed one's task and exit status."""
        while True:
            statuses = [process.poll() for process in self._processes]
            failed = [(task, status) for task, status in zip(self.tasks, statuses, strict=True) if status]
            causes = [
                pair for pair in failed if pair[1] != MISSES_ANOTHER
            ]  # those that miss one end before it, or after
            if causes:
                return causes[0]
            if None not in statuses:
                return failed[0] if failed else None
            time.sleep(_LOOK_S)


def end_of(status: int) -> str:
    """An exit status in words, as in "was killed by SIGKILL"."""
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
