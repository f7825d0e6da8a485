"""``python -m safelight.worker.rank.nursery``: imports a worker's modules once, and forks workers from itself.

Its standard input is a packet socket to the launcher. Each packet carries the standard input of a new worker; the
answer is that worker's process id. The worker's parent is the launcher. The nursery opens no device and has one thread,
so that its forks behave like new processes.
"""

from __future__ import annotations

import os
import signal
import socket
import sys

from ...process.child import name_process
from ...process.logs import configure_logging
from ...protocol.config import Config

_STDIN = 0


def main() -> int:
    name_process("nursery")
    configure_logging(Config(), "nursery")  # for the libraries' messages during import; each worker configures its own
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from .__main__ import import_rank, leave, run_rank  # torch

    import_rank()
    stdin = _fork_workers(socket.socket(fileno=os.dup(_STDIN)))
    if stdin is not None:
        os.dup2(stdin, _STDIN)
        os.close(stdin)
        leave(run_rank())
    return 0


def _fork_workers(channel: socket.socket) -> int | None:
    """Fork workers until the launcher exits. Returns ``None`` then, and in a worker its standard input."""
    with channel:
        while True:
            packet, descriptors, _, _ = socket.recv_fds(channel, 64, 1)
            if not packet:
                return None
            (stdin,) = descriptors
            pid = fork_orphan()
            if pid is None:
                return stdin
            os.close(stdin)
            channel.send(str(pid).encode())


def fork_orphan() -> int | None:
    """Fork a child whose parent exits at once. Returns its process id, and ``None`` in the child.

    The child leads its own session before the launcher knows its id, so that a signal to its group reaches it.
    """
    known, tell = os.pipe()
    between = os.fork()
    if between == 0:
        if os.fork() != 0:
            os._exit(0)
        os.close(known)
        os.setsid()
        os.write(tell, str(os.getpid()).encode())
        os.close(tell)
        return None
    os.close(tell)
    os.waitpid(between, 0)
    with open(known, "rb") as pipe:
        return int(pipe.read())


if __name__ == "__main__":
    sys.exit(main())
