"""``python -m safelight.worker.rank``: one rank of a replica, with its configuration on standard input."""

from __future__ import annotations

import gc
import logging
import os
import sys
from typing import NoReturn

from ...process.child import name_process, read_child_config
from ...process.logs import adopt_library_loggers, configure_logging


def import_rank() -> None:
    """Import everything that a rank runs.

    peft is hidden, because diffusers and transformers import it if it is installed, which takes a sixth of the time,
    and Safelight does not use it. Garbage collection is off meanwhile: it would find nothing and take a tenth.
    """
    sys.modules["peft"] = None  # type: ignore[assignment]  # as if it were not installed
    gc.disable()
    from . import rank_process  # noqa: F401

    gc.freeze()
    gc.enable()


def run_rank() -> int:
    """Serve as the rank that standard input says. Returns the process's exit status."""
    child = read_child_config()
    rank = f".{child.rank}" if child.config.replica_ranks > 1 else ""
    name = f"worker-{child.replica}{rank}"
    name_process(name)
    configure_logging(child.config, name)
    import_rank()  # after the pipe to the launcher is watched
    adopt_library_loggers()
    from .rank_process import RankProcess

    return RankProcess(child).run()


def leave(status: int) -> NoReturn:
    """Exit without tearing down thousands of modules, which would take a second."""
    logging.shutdown()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    leave(run_rank())
