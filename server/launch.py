"""``python -m safelight.server``: checks, starts every process, serves, and leaves nothing behind.

FastAPI and what else serves is imported after the nursery was started, whose own imports take longer.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import FrameType
from typing import NoReturn

import msgspec

from ..formats.checkpoint import check_model
from ..process.logs import configure_logging, escaped
from ..protocol.child_config import ChildConfig
from ..protocol.config import Config
from ..protocol.errors import StartFailed
from .descriptors import raise_descriptor_limit
from .flags import read_config
from .heap import give_back_large_blocks
from .journal_lock import own_journal
from .json_stderr import json_stderr
from .listener import listen
from .nursery import Nursery
from .own_directories import own_directories

WRONG_START = 2
"""Exit status when the server was asked for something that cannot be."""

FAILED = 1
"""Exit status when a process was lost that the server cannot go on without."""

log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a server until it is stopped. Returns the exit status."""
    started = time.monotonic()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)  # until there is something to stop
    raise_descriptor_limit()
    give_back_large_blocks()
    os.umask(0o077)  # what any process of the server writes is nobody else's to read
    try:
        config = read_config(sys.argv[1:] if arguments is None else arguments, os.environ)
        if config.until_stdin_closes and sys.stdin is None:
            raise StartFailed("--until-stdin-closes was asked for, but standard input is closed already.")
    except StartFailed as error:
        print(escaped(error.message), file=sys.stderr)
        return WRONG_START
    configure_logging(config, "server")
    with json_stderr() if config.log_format == "json" else nullcontext():
        return _run(config, started)


def _run(config: Config, started: float) -> int:
    try:
        check_model(config.model, revision=config.revision, base=config.base_pipeline)
        listener = listen(config.host, config.port, beyond_loopback=config.insecure or config.api_key is not None)
    except StartFailed as error:
        _tell(error.message, config)
        return WRONG_START
    try:
        with listener, own_journal(config.weights_journal), own_directories(config) as child:
            return asyncio.run(_serve(child, listener, started))
    except StartFailed as error:
        _tell(error.message, config)  # last of all, so that it is what the reader sees
        return FAILED


def _tell(message: str, config: Config) -> None:
    if config.log_format == "json":
        log.error("%s", message)
    else:
        print(escaped(message), file=sys.stderr)


async def _serve(child: ChildConfig, listener: socket.socket, started: float) -> int:
    config = child.config
    nursery = Nursery() if config.nursery and Nursery.AVAILABLE else None
    try:
        from .adapter_files import first_adapters
        from .run import Run
        from .scheduler_link import SchedulerLink

        child = msgspec.structs.replace(child, adapters=first_adapters(config, Path(child.shared)))
        async with SchedulerLink(
            child.frontend, request_timeout_s=config.request_timeout_s, most_unheard=config.max_queue_mb * 2**20
        ) as link:
            return await Run(child, link, listener, nursery, started).until_stopped()
    finally:
        if nursery is not None:
            await nursery.stop()


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(0)
