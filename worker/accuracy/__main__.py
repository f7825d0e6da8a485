"""``python -m safelight.worker.accuracy``: the program behind ``safelight verify``."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence

import msgspec

from ...formats.checkpoint import check_model
from ...protocol.errors import StartFailed
from .flags import read_flags, task_of
from .policy import load_policy
from .processes import VerificationRanks, end_of
from .report import VerificationReport
from .task import VerificationTask

PASSED, FAULT, NOT_COMPARED, INTERRUPTED = 0, 1, 2, 130
"""Exit statuses."""


def main(arguments: Sequence[str] | None = None) -> int:
    flags = read_flags(sys.argv[1:] if arguments is None else arguments)
    try:
        load_policy(flags.policy)
        check_model(flags.model)
        with tempfile.TemporaryDirectory(prefix="safelight-verify-", ignore_cleanup_errors=True) as directory:
            report = _run(task_of(flags, directory))
    except StartFailed as failed:
        print(failed.message, file=sys.stderr)
        return NOT_COMPARED
    except KeyboardInterrupt:
        return INTERRUPTED
    if not report.compared:
        print("Nothing was compared: the policy skips all of it.", file=sys.stderr)
        return NOT_COMPARED
    if flags.report is not None:
        report.write(flags.report)
    print(report.to_json() if flags.json else report.to_markdown(), end="")
    return PASSED if report.passed else FAULT


def _run(task: VerificationTask) -> VerificationReport:
    """Run the ranks of ``task``. Raises ``StartFailed`` if they make no report."""
    with VerificationRanks(task) as ranks:
        lost = ranks.wait()
    if lost is None:
        return msgspec.msgpack.decode(task.report.read_bytes(), type=VerificationReport)
    failed, status = lost
    if failed.failure.exists():
        raise StartFailed(failed.failure.read_text())
    raise StartFailed(f"Rank {failed.rank} of {task.tp} {end_of(status)}, so the components were not compared.")


if __name__ == "__main__":
    sys.exit(main())
