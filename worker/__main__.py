"""``python -m safelight.worker``: one rank of a replica, with its configuration on standard input."""

from __future__ import annotations

import gc
import logging
import os
import sys
from typing import NoReturn

from ..process.child import name_process, read_child_config
from ..process.logs import adopt_library_loggers, configure_logging


def import_replica() -> None:
    """Import everything that a rank runs.

    Diffusers and transformers import peft wherever it is installed, for a sixth of the imports' time, and we have no
    use for it; collecting garbage among the objects of thousands of modules finds nothing, and takes a tenth.
    """
    sys.modules["peft"] = None  # type: ignore[assignment]  # as if it were not installed
    gc.disable()
    from . import replica  # noqa: F401

    gc.freeze()
    gc.enable()


def run_replica() -> int:
    """Serve as the rank that standard input says. Returns the process's exit status."""
    child = read_child_config()
    rank = f".{child.rank}" if child.config.tp > 1 else ""
    name = f"worker-{child.replica}{rank}"
    name_process(name)
    configure_logging(child.config, name)
    import_replica()  # after the pipe to the launcher is watched
    adopt_library_loggers()
    from .replica import Replica

    return Replica(child).run()


def leave(status: int) -> NoReturn:
    """End this process. Taking thousands of modules apart would take a second, and the system frees what they hold."""
    logging.shutdown()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    leave(run_replica())
