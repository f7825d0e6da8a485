"""Errors that cross a process boundary.

Each class is one row of the wire contract's error table: it carries the code and the HTTP status that clients see, so
that no process has to translate another one's failures.
"""

from __future__ import annotations

from typing import ClassVar

import msgspec


class ErrorInfo(msgspec.Struct, frozen=True):
    """An error as it travels between processes and, without ``status``, in a reply's body."""

    code: str
    message: str
    status: int
    field: str | None = None
    retry_after_s: float | None = None


class SafelightError(Exception):
    """Base of every error that is meant for the person who sent a request or started a server."""

    code: ClassVar[str] = "internal"
    status: ClassVar[int] = 500

    def __init__(self, message: str, *, field: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.retry_after_s = retry_after_s

    def info(self) -> ErrorInfo:
        return ErrorInfo(self.code, self.message, self.status, self.field, self.retry_after_s)


class InvalidRequest(SafelightError):
    """A value that the request may not have: out of range, or not what the model can do."""

    code, status = "invalid_request", 400


class Unauthorized(SafelightError):
    """No API key was sent where one is needed."""

    code, status = "unauthorized", 401


class Forbidden(SafelightError):
    """An API key was sent, and it is not the right one."""

    code, status = "forbidden", 403


class NotFound(SafelightError):
    """An id, an adapter, a module or a route that does not exist."""

    code, status = "not_found", 404


class Conflict(SafelightError):
    """The right request in the wrong state."""

    code, status = "conflict", 409


class BodyTooLarge(SafelightError):
    """A body over the configured limit."""

    code, status = "body_too_large", 413


class Malformed(SafelightError):
    """A body that cannot be read as what the route takes: not JSON, a wrong type, an unknown field."""

    code, status = "malformed", 422


class QueueFull(SafelightError):
    """The queue is at its bound; ``retry_after_s`` says when it is worth asking again."""

    code, status = "queue_full", 429


class ClientGone(SafelightError):
    """The client closed its connection. Nobody reads this error; it is counted."""

    code, status = "client_gone", 499


class Internal(SafelightError):
    """A fault of ours. Its message never carries a library's exception text; the log does."""

    code, status = "internal", 500


class Unavailable(SafelightError):
    """No healthy replica, or the one that had the request was lost."""

    code, status = "unavailable", 503


class DeadlinePassed(SafelightError):
    """The request's own time limit ran out."""

    code, status = "deadline_passed", 504


class StartFailed(SafelightError):
    """The server cannot start as asked; the message is one sentence that says what to do."""

    code, status = "start_failed", 500


_ERRORS = SafelightError.__subclasses__()
"""Every error of the contract; subclasses that other modules make are not among them."""

BY_STATUS = {cls.status: cls for cls in reversed(_ERRORS)}
"""The errors by status; of several, the first."""

_BY_CODE = {cls.code: cls for cls in _ERRORS}


def from_info(info: ErrorInfo) -> SafelightError:
    """The exception that ``info`` was made from; an unknown code becomes ``Internal``."""
    cls = _BY_CODE.get(info.code, Internal)
    return cls(info.message, field=info.field, retry_after_s=info.retry_after_s)
