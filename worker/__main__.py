"""``python -m safelight.worker``: one replica, started by the launcher with its configuration on standard input."""

from __future__ import annotations

import gc
import sys

from ..protocol.child import read_child_config
from ..protocol.logs import configure_logging


def main() -> int:
    child = read_child_config()
    rank = f".{child.rank}" if child.config.tp > 1 else ""
    configure_logging(child.config, f"worker-{child.replica}{rank}")
    # Diffusers and transformers import peft wherever it is installed, for a sixth of the imports' time, and we have no
    # use for it; collecting garbage among the objects of thousands of modules finds nothing, and takes a tenth.
    sys.modules["peft"] = None  # type: ignore[assignment]  # as if it were not installed
    gc.disable()
    from .replica import Replica  # imports torch: after the pipe to the launcher is watched

    gc.freeze()
    gc.enable()
    return Replica(child).run()


if __name__ == "__main__":
    sys.exit(main())
