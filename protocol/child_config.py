"""The configuration of a child process: the server's, and which child it is."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from .adapters import SetAdapters
from .config import Config
from .self_test import SelfTestResult

SHARED_MEMORY = "/dev/shm"  # where Linux keeps files in memory


class ChildConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the launcher writes to a scheduler's or worker's standard input as its first line.

    The pipe then stays open: its end tells the child that the launcher is gone. ``replica`` is ``None`` for the
    scheduler. The sockets lie in ``directory`` (mode 0700). ``start`` counts the starts of the replica.
    """

    config: Config
    directory: str
    replica: int | None = None
    rank: int = 0
    start: int = 0
    adapters: SetAdapters | None = None
    """What the scheduler is to have every replica begin with."""
    self_test: SelfTestResult | None = None
    """What a replica of this server has found out about the model."""

    def without_key(self) -> ChildConfig:
        """For a child process, which asks nobody for the key."""
        return msgspec.structs.replace(self, config=msgspec.structs.replace(self.config, api_key=None))

    @property
    def directories(self) -> list[str]:
        """What is to be removed when all has ended."""
        return [self.directory, self.shared]

    @property
    def meeting_place(self) -> str:
        """The path, of this start alone, below which the ranks of a replica find each other."""
        return f"{self.directory}/replica-{self.replica}-start-{self.start}"

    @property
    def shared(self) -> str:
        """The directory in shared memory through which large tensors come; nobody else's, like ``directory``."""
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
