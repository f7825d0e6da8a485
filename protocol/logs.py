"""Log lines of every process, alike: time, level, process, request id, message; as text or as JSON."""

from __future__ import annotations

import contextvars
import json
import logging
import sys
import time

from .config import Config

request_id_var: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="-")
"""The request that the current task or coroutine works for."""


class _Context(logging.Filter):
    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def filter(self, record: logging.LogRecord) -> bool:
        record.process_name = self._process
        if not hasattr(record, "request_id"):
            record.request_id = request_id_var.get()
        return True


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "process": vars(record)["process_name"],
            "request_id": vars(record)["request_id"],
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def configure_logging(config: Config, process: str) -> None:
    """Send this process's log to standard error. ``process`` is e.g. ``"server"`` or ``"worker-0"``.

    Code logs with ``logging.getLogger(__name__)``; a request's id comes from ``request_id_var`` or, where a process
    works for many at once, from ``extra={"request_id": ...}``.
    """
    handler = logging.StreamHandler(sys.stderr)
    text = "%(asctime)s %(levelname)-7s %(process_name)s [%(request_id)s] %(message)s"
    handler.setFormatter(_Json() if config.log_format == "json" else logging.Formatter(text))
    handler.addFilter(_Context(process))
    logging.basicConfig(level=config.log_level.upper(), handlers=[handler], force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)
