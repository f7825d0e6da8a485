"""Python imports this at the start of each program while its directory is on ``PYTHONPATH``.

A worker then has ``PLAYED_DEVICES`` played CUDA devices, each with ``PLAYED_BYTES`` of memory, from before it imports
the first module that needs torch. They break in one worker once the file ``PLAYED_BREAKS`` exists.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path


class _BeforeTheWorker:
    """A finder of modules that finds none, and installs the devices when a worker's first module is looked for."""

    _installed = False

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name == "safelight.worker.rank.rank_process" and not cls._installed:
            cls._installed = True
            from safelight.tests import played

            devices = int(os.environ["PLAYED_DEVICES"])
            record = played.install(devices)
            record.notes_waits = False
            record.breaks = Path(os.environ["PLAYED_BREAKS"]) if "PLAYED_BREAKS" in os.environ else None
            for index in range(devices):
                record.memory(index).limit = int(os.environ.get("PLAYED_BYTES", played.Memory().limit))
        return None


if "PLAYED_DEVICES" in os.environ:
    sys.meta_path.insert(0, _BeforeTheWorker)  # type: ignore[arg-type]
