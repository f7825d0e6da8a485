"""``python -m safelight.scheduler``: reads its configuration from standard input and schedules until SIGTERM."""

from __future__ import annotations

import logging
import signal
import sys
from types import FrameType

import zmq

from ..process.child import name_process, read_child_config
from ..process.logs import configure_logging
from .loop import Loop

logger = logging.getLogger(__name__)


def main() -> int:
    """Run until SIGTERM, whose ``SystemExit`` has status 0. Returns the status of a failure."""
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the launcher too, which first lets requests finish
    child = read_child_config()
    name_process("scheduler")
    configure_logging(child.config, "scheduler")
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        Loop(child, context).run()
    except zmq.ZMQError as error:
        logger.error("the scheduler's sockets in %s do not work: %s", child.directory, error)
    except Exception:
        logger.exception("the scheduler ends because of a fault of its own")
    finally:
        context.destroy(linger=0)
    return 1


def _leave(signum: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise SystemExit(0)


if __name__ == "__main__":
    sys.exit(main())
