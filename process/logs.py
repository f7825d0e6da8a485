"""Log lines of all processes, with time, level, process, request id and message, as text or as JSON."""

from __future__ import annotations

import contextvars
import json
import logging
import re
import sys
import time
import warnings
from typing import Any

from ..protocol.config import Config

request_id_var: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="-")
"""The request that the current task or coroutine serves."""


class _Context(logging.Filter):
    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def filter(self, record: logging.LogRecord) -> bool:
        record.process_name = self._process
        if not hasattr(record, "request_id"):
            record.request_id = request_id_var.get()
        return True


_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that end a line, move the cursor, change the text's direction, or cannot be encoded."""


def escaped(text: str) -> str:
    """Escape line ends and terminal control characters, because clients write parts of ``text``."""
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class _Text(logging.Formatter):
    """One line per record; further lines, such as a traceback's, are indented, so that none can pass for a record."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return escaped(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        return _indented(super().formatException(ei))

    def formatStack(self, stack_info: str) -> str:
        return _indented(super().formatStack(stack_info))


def _indented(text: str) -> str:
    return "\n".join("    " + escaped(line) for line in text.split("\n"))


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "process": vars(record)["process_name"],
            "request_id": vars(record)["request_id"],
            "logger": record.name,
            "message": record.getMessage(),
            **vars(record).get("fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def as_json_line(text: str) -> str:
    """Return ``text`` if it is a JSON line, else a JSON line with its message (a progress bar's last state)."""
    if text.startswith("{"):
        try:
            json.loads(text)
        except ValueError:
            pass
        else:
            return text
    record = logging.LogRecord("stderr", logging.WARNING, "", 0, text.rpartition("\r")[2], None, None)
    _Context("stderr").filter(record)
    return _Json().format(record)


def configure_logging(config: Config, process: str) -> None:
    """Send this process's log to standard error. ``process`` is for example ``"server"`` or ``"worker-0"``.

    Code logs with ``logging.getLogger(__name__)``. The request id comes from ``request_id_var`` or, in a process that
    works on many requests at once, from ``extra={"request_id": ...}``. ``extra={"fields": {...}}`` adds fields to a
    JSON line. Warnings are logged too.
    """
    handler = logging.StreamHandler(sys.stderr)
    text = "%(asctime)s %(levelname)-7s %(process_name)s [%(request_id)s] %(message)s"
    handler.setFormatter(_Json() if config.log_format == "json" else _Text(text))
    handler.addFilter(_Context(process))
    logging.basicConfig(level=config.log_level.upper(), handlers=[handler], force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    warnings.formatwarning = _warning
    logging.captureWarnings(True)
    adopt_library_loggers()


def adopt_library_loggers() -> None:
    """Route warnings and errors of libraries to this process's log; torch and transformers install own handlers.

    Call it again after further imports of libraries.
    """
    for logger in list(logging.root.manager.loggerDict.values()):
        if isinstance(logger, logging.Logger) and (logger.handlers or not logger.propagate):
            logger.handlers.clear()
            logger.propagate = True
            logger.setLevel(max(logger.getEffectiveLevel(), logging.WARNING))


def _warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    return f"{category.__name__}: {message} ({filename}:{lineno})"
