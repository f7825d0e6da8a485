"""The configuration of a child process: the server's configuration and the child's identity."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from .adapters import SetAdapters
from .config import Config
from .self_test import SelfTestResult

SHARED_MEMORY = "/dev/shm"  # where Linux keeps files in memory


class ChildConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The first line that the launcher writes to the standard input of a scheduler or worker.

    The pipe then stays open: its end tells the child that the launcher has ended. ``replica`` is ``None`` for the
    scheduler. The sockets lie in ``directory`` (mode 0700). ``start`` counts the starts of the replica.
    """

    config: Config
    directory: str
    replica: int | None = None
    rank: int = 0
    start: int = 0
    adapters: SetAdapters | None = None
    """The adapters that every replica loads at its start."""
    self_test: SelfTestResult | None = None
    """The results of a self-test of this server's replicas."""

    @property
    def global_rank(self) -> int:
        """The number of this rank among those of all replicas."""
        assert self.replica is not None, "a worker's configuration"
        return self.replica * self.config.replica_ranks + self.rank

    def without_key(self) -> ChildConfig:
        """The configuration without the API key, for child processes."""
        return msgspec.structs.replace(self, config=msgspec.structs.replace(self.config, api_key=None))

    @property
    def directories(self) -> list[str]:
        """The directories to remove when all processes have ended."""
        return [self.directory, self.shared]

    @property
    def rendezvous_path(self) -> str:
        """The path prefix, unique to this start, at which the ranks of a replica meet."""
        return f"{self.directory}/replica-{self.replica}-start-{self.start}"

    @property
    def shared(self) -> str:
        """The directory in shared memory for large tensors; private (mode 0700), like ``directory``."""
        name = Path(self.directory).name
        usable = os.access(SHARED_MEMORY, os.W_OK | os.X_OK)  # a container's may be read-only
        return f"{SHARED_MEMORY}/{name}" if usable else f"{self.directory}/shared"

    @property
    def frontend(self) -> str:
        """Where the scheduler's socket for the server is bound."""
        return f"ipc://{self.directory}/frontend"

    @property
    def backend(self) -> str:
        """Where the scheduler's socket for the workers is bound."""
        return f"ipc://{self.directory}/backend"
