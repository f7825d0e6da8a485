"""The state shared by the endpoints."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ParamSpec, TypeVar

from ..protocol.adapters import SetAdapters
from ..protocol.config import Config
from ..protocol.errors import Unavailable
from ..protocol.replicas import ModelInfo
from .adapter_store import AdapterStore
from .metrics import Metrics
from .picture_decoding import PictureDecoding
from .scheduler_link import SchedulerLink
from .unread import Unread

P = ParamSpec("P")
T = TypeVar("T")

_THREADS = 2


class Service:
    """One running server, as its endpoints see it."""

    def __init__(
        self, config: Config, link: SchedulerLink, shared: Path, first_adapters: SetAdapters | None = None
    ) -> None:
        self.config = config
        self.link = link
        self.shared = shared
        """The server's own directory in shared memory."""
        first = {source.folder for source in first_adapters.sources} if first_adapters is not None else set()
        self.adapter_store = AdapterStore(shared, link, first)
        self.metrics = Metrics(link)
        self.pictures = PictureDecoding()
        self.unread = Unread(shared, config.max_unread_mb * 2**20)
        self._operators = ThreadPoolExecutor(_THREADS, thread_name_prefix="operators")
        self._started_at = time.monotonic()

    def model(self) -> ModelInfo:
        """The model that was loaded last, ready or not. Raises ``Unavailable`` before that."""
        model = self.link.model()
        if model is None:
            raise Unavailable("The model is still loading.")
        return model

    async def decode(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """``function`` in one of a few threads for what operators and trainers send; pictures never take one."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._operators, functools.partial(function, *args, **kwargs))

    @property
    def uptime_s(self) -> float:
        return time.monotonic() - self._started_at
