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
    sys.modules["peft"] = None  # type: ignore[assignment]  # so it is not there: we have no use for it, and diffusers
    # and transformers import it wherever it is installed, for a sixth of the time that all imports take
    gc.disable()  # among the objects of thousands of modules it finds nothing, and takes a tenth of the import's time
    from .replica import Replica  # imports torch: after the pipe to the launcher is watched

    gc.freeze()
    gc.enable()
    return Replica(child).run()


if __name__ == "__main__":
    sys.exit(main())
