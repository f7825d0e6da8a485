"""What the endpoints share."""

from __future__ import annotations

import time

from ..protocol.config import Config
from .metrics import Metrics
from .scheduler_link import SchedulerLink


class Service:
    """One running server, as its endpoints see it."""

    def __init__(self, config: Config, link: SchedulerLink) -> None:
        self.config = config
        self.link = link
        self.metrics = Metrics(link)
        self._started_at = time.monotonic()

    @property
    def uptime_s(self) -> float:
        return time.monotonic() - self._started_at
